"""Progress of a grid: a bar with an ETA on a terminal, a line per cell in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from vlmdefend.evaluation.launchers.listener import Failure, Listener

if TYPE_CHECKING:
    from vlmdefend.evaluation.grid.planned import Plan
    from vlmdefend.evaluation.store.records import Cell, Record


class Lines(Listener):
    """One plain line when a cell is done."""

    def __init__(self, cells: int, console: Console) -> None:
        self.cells, self.console = cells, console
        self.done = 0
        self.started = time.monotonic()

    def begin(self, cell: Cell) -> None:
        """Start the cell's clock."""
        self.started = time.monotonic()

    def end(self, record: Record, *, reused: bool) -> None:
        """Say what came out."""
        self.done += 1
        robust = "" if record.cell.attack == "none" else f", robust {100 * record.robust / record.n:.1f} %"
        how = "found done" if reused else f"{time.monotonic() - self.started:.1f} s"
        self.say(
            f"[{self.done}/{self.cells}] {record.cell.title()}: "
            f"clean {100 * record.clean_correct / record.n:.1f} %{robust} ({how})"
        )

    def fail(self, failure: Failure, images: int, cells: int = 1) -> None:
        """Say that there is nothing; the message comes at the end."""
        self.done += 1
        self.say(f"[{self.done}/{self.cells}] {failure.what}: failed")

    def note(self, message: str) -> None:
        """Pass it on."""
        self.say(message)

    def say(self, text: str) -> None:
        """Print as it is: names from data are no markup."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


class Bar(Lines):
    """A bar over all images of all cells, above the lines."""

    def __init__(self, plan: Plan, console: Console, progress: Progress) -> None:
        super().__init__(len(plan.cells), console)
        self.progress = progress
        self.task = progress.add_task("", total=sum(len(cell.images) for cell in plan.cells))

    def begin(self, cell: Cell) -> None:
        """Name the cell beside the bar."""
        super().begin(cell)
        budget = "" if cell.attack == "none" else f" {cell.attacker}"
        self.progress.update(self.task, description=f"{cell.defense} {cell.attack}{budget}")

    def advance(self, cell: Cell, images: int) -> None:
        """Move the bar."""
        self.progress.advance(self.task, images)

    def fail(self, failure: Failure, images: int, cells: int = 1) -> None:
        """A failed cell's images will not come."""
        super().fail(failure, images, cells)
        self.progress.advance(self.task, images)


@contextmanager
def progress_listener(plan: Plan) -> Iterator[Listener]:
    """The listener that suits standard error: a bar on a terminal, lines elsewhere."""
    console = Console(stderr=True)
    if not sys.stderr.isatty():
        yield Lines(len(plan.cells), console)
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        yield Bar(plan, console, progress)
