"""Who hears how a training run goes. Torch-free, so that the command line can subclass it cheaply."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple


class Counted(NamedTuple):
    """So many of so many."""

    hits: int
    n: int

    @property
    def share(self) -> float:
        """Between 0 and 1."""
        return self.hits / self.n


class Accuracies(NamedTuple):
    """One model on the images that are held out."""

    clean: Counted
    robust: Counted

    @classmethod
    def read(cls, written: Sequence[Sequence[int]]) -> Accuracies:
        """From JSON, where each count is a list."""
        clean, robust = written
        return cls(Counted(*clean), Counted(*robust))


class EpochEnd(NamedTuple):
    """What an epoch came to."""

    stage: str
    epoch: int  # 1, 2, ...
    epochs: int
    loss: float
    metrics: dict[str, float]
    held_out: Accuracies | None
    seconds: float
    probed: Mapping[str, Counted] = MappingProxyType({})  # what else was counted


class Gap(NamedTuple):
    """How proxies take the adversarial images of one target; ``adversarial`` holds the target itself too."""

    target: str
    clean: dict[str, Counted]
    adversarial: dict[str, Counted]


class Listener:
    """Listens to nothing; override what is of interest."""

    def gap(self, gap: Gap) -> None:
        """The proxy gap, measured before training."""

    def begin(self, stage: str, steps: int, done: int) -> None:
        """A stage of so many steps starts, or goes on after ``done`` of them."""

    def step(self, values: dict[str, Any]) -> None:
        """One step, as the log has it."""

    def epoch(self, end: EpochEnd) -> None:
        """An epoch is done."""

    def note(self, message: str) -> None:
        """Something the user should know."""
