"""Counts forwards and backwards of the bare model: the cost unit in which defenses and attacks are compared."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor

from vlmdefend.rng import ImageRng
from vlmdefend.types import Outputs, Pipeline


class PassCount(NamedTuple):
    """Forwards and backwards, in images, and seconds."""

    forwards: int
    backwards: int
    seconds: float

    def since(self, before: PassCount) -> PassCount:
        """Returns what was counted after ``before``."""
        forwards, backwards = self.forwards - before.forwards, self.backwards - before.backwards
        return PassCount(forwards, backwards, self.seconds - before.seconds)


class CountingModel:
    """Wraps a model and counts its forwards and backwards, in images."""

    def __init__(self, model: Pipeline) -> None:
        self.model = model
        self.num_classes, self.stochastic = model.num_classes, model.stochastic
        self.forwards = 0
        self.backwards = 0

    def __call__(self, images: Tensor, rng: ImageRng) -> Outputs:
        """Predicts and counts."""
        outputs = self.model(images, rng)
        # every gradient passes through the features, which come before the logits
        self._count(outputs.logits if outputs.features is None else outputs.features)
        return outputs

    def features(self, images: Tensor) -> Tensor:
        """Returns the features of the wrapped model and counts the query."""
        features: Tensor = self.model.features(images)  # type: ignore[attr-defined]
        self._count(features)
        return features

    def __getattr__(self, name: str) -> Any:
        """Returns an attribute of the wrapped model, such as ``text_features``; it costs no forward."""
        if name.startswith("_") or name == "model":
            raise AttributeError(name)
        return getattr(self.model, name)

    def spent(self) -> PassCount:
        """The passes counted so far."""
        return PassCount(self.forwards, self.backwards, time.perf_counter())

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Returns a context in which nothing is counted, for the evaluator's own checks."""
        before = self.forwards, self.backwards
        try:
            yield
        finally:
            self.forwards, self.backwards = before

    def _count(self, output: Tensor) -> None:
        """Counts a forward, and its backward once a gradient reaches ``output``."""
        self.forwards += len(output)
        if output.requires_grad:
            output.register_hook(lambda gradient: self._count_backward(len(gradient)))  # type: ignore[no-untyped-call]

    def _count_backward(self, images: int) -> None:
        self.backwards += images
