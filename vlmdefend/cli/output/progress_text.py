"""The words of each command's progress: of a grid of cells, and of training."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from vlmdefend.evaluation.grid.planned import Plan
    from vlmdefend.evaluation.store.records import Cell, Record
    from vlmdefend.progress import Failure
    from vlmdefend.training.loop.results import EpochResult, ProxyGap
    from vlmdefend.training.settings.distill_settings import DistillSettings


class GridText:
    """The lines of ``evaluate`` and ``attack``: one per cell."""

    def __init__(self, plan: Plan) -> None:
        self.cells, self.done, self.started = len(plan.cells), 0, time.monotonic()
        self.total: int | None = sum(len(cell.images) for cell in plan.cells)

    def begin(self, unit: Cell) -> None:
        """Starts the clock of a cell."""
        self.started = time.monotonic()

    def label(self, unit: Cell) -> str:
        """Defense, attack and attacker of the cell."""
        return f"{unit.defense} {unit.attack}" + ("" if unit.attack == "none" else f" {unit.attacker}")

    def line(self, result: Record, *, reused: bool) -> str:
        """Accuracies of a finished cell, and the seconds that it took."""
        self.done += 1
        robust = "" if result.cell.attack == "none" else f", robust {100 * result.robust / result.n:.1f} %"
        how = "found done" if reused else f"{time.monotonic() - self.started:.1f} s"
        clean = f"clean {100 * result.clean_correct / result.n:.1f} %"
        return f"[{self.done}/{self.cells}] {result.cell.title()}: {clean}{robust} ({how})"

    def failed(self, failure: Failure) -> str:
        """A cell without a record."""
        self.done += 1
        return f"[{self.done}/{self.cells}] {failure.what}: failed"

    def measured(self, result: Any, console: Console) -> None:
        """A grid has no such measurement."""


@dataclass
class TrainingText:
    """The lines of ``train`` and ``urda-train``: one per epoch."""

    prefix: str = ""  # before the name of the stage
    percentages: tuple[str, ...] = ("accuracy", "agreement", "share")  # metrics whose names hold these are printed
    attacked: str = "attacked"  # the word for accuracy under attack
    total: int | None = field(default=None, init=False)

    def begin(self, unit: str) -> None:
        """A stage needs no clock: its epochs carry their seconds."""

    def label(self, unit: Any) -> str:
        """The stage, and the loss of the step just done."""
        if isinstance(unit, str):
            return f"{self.prefix}{unit}"
        return f"{self.prefix}{unit['stage']} loss {unit['loss']:.3g}"

    def line(self, result: EpochResult, *, reused: bool) -> str:
        """Loss, metrics and held-out accuracies of an epoch."""
        text = f"{self.prefix}{result.stage} epoch {result.epoch}/{result.epochs}: loss {result.loss:.4g}"
        for name, value in result.metrics.items():
            if any(word in name for word in self.percentages):
                text += f", {self.metric(name)} {100 * value:.1f} %"
        if result.held_out is not None:
            clean, robust = result.held_out
            text += f"; held out: clean {100 * clean.share:.1f} %, {self.attacked} {100 * robust.share:.1f} %"
        for name, count in result.probed.items():
            text += f", {name.replace('_', ' ')} {100 * count.share:.1f} %"
        return f"{text} ({result.seconds:.0f} s)"

    def metric(self, name: str) -> str:
        """A metric's name in words."""
        return name.replace("_", " ")

    def failed(self, failure: Failure) -> str:
        """Training has one unit; its failure ends the command."""
        return f"{failure.what}: failed"

    def measured(self, result: ProxyGap, console: Console) -> None:
        """These commands measure no proxy gap."""


@dataclass
class DistillText(TrainingText):
    """The lines of ``distill``: the proxy gap, then one line per epoch."""

    settings: DistillSettings = field(kw_only=True)
    prefix: str = "stage "
    percentages: tuple[str, ...] = ("accuracy",)
    attacked: str = "robust"

    def metric(self, name: str) -> str:
        """``student_accuracy_adversarial`` reads ``student on adversarial``."""
        return name.replace("_accuracy_", " on ")

    def measured(self, result: ProxyGap, console: Console) -> None:
        """Prints the proxy gap and its warnings."""
        from vlmdefend.cli.output.distill_report import print_gap
        from vlmdefend.training.clip.distillation_job import warnings_of

        print_gap(result, self.settings.eps, self.settings.target, self.settings.proxy)
        for line in (*(f"warning: {warning}" for warning in warnings_of(result)), ""):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
