"""Shows the progress of a run on standard error: a bar with an ETA on a terminal, one line per result elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from vlmdefend.progress import Failure, Progress


class ProgressText(Protocol):
    """The words of one command's progress."""

    total: int | None  # images of all cells: one bar for the whole run; None: a fresh bar for every stage

    def begin(self, unit: Any) -> None:
        """A cell or stage starts."""

    def label(self, unit: Any) -> str:
        """The text beside the bar."""

    def line(self, result: Any, *, reused: bool) -> str:
        """The line of a finished cell or epoch."""

    def failed(self, failure: Failure) -> str:
        """The line of a cell that could not be computed."""

    def measured(self, result: Any, console: Console) -> None:
        """Prints a measurement that is made before training."""


class LogLines(Progress):
    """Prints one plain line per finished cell or epoch."""

    def __init__(self, console: Console, text: ProgressText) -> None:
        self.console, self.text = console, text

    def begin(self, unit: Any, total: int, done: int = 0) -> None:
        """Passes the start of a cell or stage to the text."""
        self.text.begin(unit)

    def end(self, result: Any, *, reused: bool = False) -> None:
        """Prints the line of a result."""
        self.note(self.text.line(result, reused=reused))

    def fail(self, failure: Failure, total: int, cells: int = 1) -> None:
        """Prints that a cell failed; its message is printed at the end of the run."""
        self.note(self.text.failed(failure))

    def measured(self, result: Any) -> None:
        """Prints a measurement that is made before training."""
        self.text.measured(result, self.console)

    def note(self, message: str) -> None:
        """Prints a message as it is: names from data are not read as markup."""
        self.console.print(message, markup=False, highlight=False, soft_wrap=True)


class ProgressBar(LogLines):
    """A bar below the lines: over all images of all cells, or over the steps of the current stage."""

    def __init__(self, console: Console, text: ProgressText, bars: Bars) -> None:
        super().__init__(console, text)
        self.bars, self.task = bars, bars.add_task("", total=text.total)

    def begin(self, unit: Any, total: int, done: int = 0) -> None:
        """Names the cell beside the bar; or starts a bar for the stage."""
        super().begin(unit, total, done)
        if self.text.total is None:
            self.bars.remove_task(self.task)
            self.task = self.bars.add_task(self.text.label(unit), total=total, completed=done)
        else:
            self.bars.update(self.task, description=self.text.label(unit))

    def advance(self, unit: Any, count: int = 1) -> None:
        """Moves the bar."""
        self.bars.update(self.task, advance=count, description=self.text.label(unit))

    def fail(self, failure: Failure, total: int, cells: int = 1) -> None:
        """Moves the bar over the images of the failed cells."""
        super().fail(failure, total, cells)
        self.bars.advance(self.task, total)


@contextmanager
def show_progress(text: ProgressText, *, main: bool = True) -> Iterator[Progress]:
    """Yields the progress that suits standard error; processes other than the main one (``main``) show nothing."""
    console = Console(stderr=True)
    if not main:
        yield Progress()
    elif not sys.stderr.isatty():
        yield LogLines(console, text)
    else:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn())
        with Bars(*columns, TimeRemainingColumn(), console=console, transient=True) as bars:
            yield ProgressBar(console, text, bars)
