"""Progress of a training run: a bar with an ETA on a terminal, a line per epoch in a log file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from vlmdefend.training.loop.listener import EpochEnd, Gap, Listener

if TYPE_CHECKING:
    from vlmdefend.training.clip.distill_settings import DistillSettings


class Lines(Listener):
    """A plain line when an epoch is done."""

    def __init__(self, console: Console, settings: DistillSettings) -> None:
        self.console, self.settings = console, settings

    def gap(self, gap: Gap) -> None:
        """Print the proxy gap and what it warns of."""
        from vlmdefend.cli.distill_report import print_gap
        from vlmdefend.training.clip.distill import warnings_of

        print_gap(gap, self.settings.eps, self.settings.target, self.settings.proxy)
        for warning in warnings_of(gap):
            self.say(f"warning: {warning}")
        self.say("")

    def epoch(self, end: EpochEnd) -> None:
        """Say what came out."""
        text = f"stage {end.stage} epoch {end.epoch}/{end.epochs}: loss {end.loss:.4g}"
        for name, value in end.metrics.items():
            if "accuracy" in name:
                text += f", {name.replace('_accuracy_', ' on ')} {100 * value:.1f} %"
        if end.held_out is not None:
            clean, robust = end.held_out
            text += f"; held out: clean {100 * clean.share:.1f} %, robust {100 * robust.share:.1f} %"
        for name, counted in end.probed.items():
            text += f", {name.replace('_', ' ')} {100 * counted.share:.1f} %"
        self.say(f"{text} ({end.seconds:.0f} s)")

    def note(self, message: str) -> None:
        """Pass it on."""
        self.say(message)

    def say(self, text: str) -> None:
        """Print as it is: names from data are no markup."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


class Bar(Lines):
    """A bar over the steps of a stage, above the lines."""

    def __init__(self, console: Console, settings: DistillSettings, progress: Progress) -> None:
        super().__init__(console, settings)
        self.progress, self.task = progress, progress.add_task("", total=None)

    def begin(self, stage: str, steps: int, done: int) -> None:
        """A fresh bar."""
        self.progress.remove_task(self.task)
        self.task = self.progress.add_task(f"stage {stage}", total=steps, completed=done)

    def step(self, values: dict[str, Any]) -> None:
        """Move it."""
        self.progress.update(self.task, advance=1, description=f"stage {values['stage']} loss {values['loss']:.3g}")


class Silent(Lines):
    """The other processes say nothing."""

    def say(self, text: str) -> None:
        """Nothing."""

    def gap(self, gap: Gap) -> None:
        """Nothing."""


@contextmanager
def listener_of(settings: DistillSettings, *, main: bool = True) -> Iterator[Lines]:
    """The listener that suits standard error: a bar on a terminal, lines elsewhere."""
    console = Console(stderr=True)
    if not main:
        yield Silent(console, settings)
    elif not sys.stderr.isatty():
        yield Lines(console, settings)
    else:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn())
        with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
            yield Bar(console, settings, progress)
