"""Counts and accuracies that a training run reports. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple


class HitCount(NamedTuple):
    """A number of hits among n images."""

    hits: int
    n: int

    @property
    def share(self) -> float:
        """Hits over n, between 0 and 1."""
        return self.hits / self.n


class Accuracies(NamedTuple):
    """Clean and robust accuracy of one model on the held-out images."""

    clean: HitCount
    robust: HitCount

    @classmethod
    def read(cls, written: Sequence[Sequence[int]]) -> Accuracies:
        """Reads what JSON holds: a list of two counts, each a list."""
        clean, robust = written
        return cls(HitCount(*clean), HitCount(*robust))


class EpochResult(NamedTuple):
    """Loss, metrics and held-out accuracies of one epoch."""

    stage: str
    epoch: int  # 1, 2, ...
    epochs: int
    loss: float
    metrics: dict[str, float]
    held_out: Accuracies | None
    seconds: float
    probed: Mapping[str, HitCount] = MappingProxyType({})  # further counts, by name


class ProxyGap(NamedTuple):
    """Accuracies of a target and its proxies on clean images and on the target's adversarial images, by model."""

    target: str
    clean: dict[str, HitCount]
    adversarial: dict[str, HitCount]
