"""Progress of ``vlmdefend urda-train``: a bar on a terminal, a line per epoch in a log file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from vlmdefend.training.loop.listener import EpochEnd, Listener

SHARES = ("accuracy", "agreement", "share")


class Lines(Listener):
    """A plain line when an epoch is done."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def epoch(self, end: EpochEnd) -> None:
        """Say what came out."""
        text = f"{end.stage} epoch {end.epoch}/{end.epochs}: loss {end.loss:.4g}"
        for name, value in end.metrics.items():
            if any(word in name for word in SHARES):
                text += f", {name.replace('_', ' ')} {100 * value:.1f} %"
        if end.held_out is not None:
            clean, moved = end.held_out
            text += f"; held out: clean {100 * clean.share:.1f} %, attacked {100 * moved.share:.1f} %"
        self.say(f"{text} ({end.seconds:.0f} s)")

    def note(self, message: str) -> None:
        """Pass it on."""
        self.say(message)

    def say(self, text: str) -> None:
        """Print as it is: names from data are no markup."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


class Bar(Lines):
    """A bar over the steps of a stage, above the lines."""

    def __init__(self, console: Console, progress: Progress) -> None:
        super().__init__(console)
        self.progress, self.task = progress, progress.add_task("", total=None)

    def begin(self, stage: str, steps: int, done: int) -> None:
        """A fresh bar."""
        self.progress.remove_task(self.task)
        self.task = self.progress.add_task(stage, total=steps, completed=done)

    def step(self, values: dict[str, Any]) -> None:
        """Move it."""
        self.progress.update(self.task, advance=1, description=f"{values['stage']} loss {values['loss']:.3g}")


@contextmanager
def listener_of(*, main: bool = True) -> Iterator[Listener]:
    """The listener that suits standard error: a bar on a terminal, lines elsewhere; other processes say nothing."""
    console = Console(stderr=True)
    if not main:
        yield Listener()
    elif not sys.stderr.isatty():
        yield Lines(console)
    else:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn())
        with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
            yield Bar(console, progress)
