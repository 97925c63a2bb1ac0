"""Hedge defense: perturbs the image away from all classes at once before the prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlmdefend.defenses import DEFENSES
from vlmdefend.defenses.base import Paradigm, Recipe
from vlmdefend.defenses.training_free._counter_attack import (
    CounterAttack,
    CounterAttacked,
    Countered,
    Sight,
    noisy,
    shown,
    sign_ascent,
)
from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng
from vlmdefend.types import Amplitude, Outputs, Pipeline


@DEFENSES.register
@dataclass(frozen=True, kw_only=True)
class Hedge(CounterAttack):
    """delta = argmax over |delta| <= eps of sum_c CE(f(x + delta), c), by PGD from a random start (Wu et al. 2021).

    The defaults are the official code's for CIFAR (eps 0.031, step 0.007, 20 steps); on CLIP papers say no more than
    "original hyper-parameters". They are pixel amplitudes and do not depend on the image size.

    Its perturbation spreads the logits until the loss is flat where it ends, so gradients through it, constant or
    unrolled, mislead. The adaptive attacker leaves the steps out and fools the model all over the ball in which they
    start: the gradient at the random starts, averaged. It tries the other two as well.

    Options:
        eps: the defender's ball, L-infinity in pixels of [0, 1].
        alpha: step size.
        steps: gradient steps.
    """

    name: ClassVar[str] = "hedge"
    paradigm: ClassVar[Paradigm] = "training-free"
    summary: ClassVar[str] = "a perturbation that raises the cross-entropy of all classes"
    citation: ClassVar[str] = "Wu et al. 2021"
    stochastic: ClassVar[bool] = True
    neutral: ClassVar[dict[str, Any] | None] = {"eps": 0.0}
    recipe: ClassVar[Recipe] = Recipe(
        "BPDA: gradient at the random start, the steps left out; perturbation constant, unrolled, or ignored, best per "
        "image; EOT over 4 starts",
        samples=4,
        surrogates=3,
        bare=True,
    )
    eps: Amplitude = 8 / 255
    alpha: Amplitude = 0.007
    steps: int = 20

    def __post_init__(self) -> None:
        if self.eps < 0 or self.alpha < 0 or self.steps < 0:
            raise UserError(f"hedge: eps={self.eps}, alpha={self.alpha} and steps={self.steps} must be zero or more.")

    def surrogate(self, model: Pipeline) -> Pipeline:
        """The deployed values; where a gradient is needed, the model at the random start."""
        return _Start(self, model)

    def surrogates(self, model: Pipeline) -> tuple[Pipeline, ...]:
        """Returns three surrogates: at the random start, constant, unrolled."""
        return self.surrogate(model), CounterAttacked(self, model, "constant"), CounterAttacked(self, model, "unrolled")

    def started(self, images: Tensor, rng: ImageRng) -> Tensor:
        """Returns images moved by uniform noise of the ball's size."""
        return noisy(images, rng, self.eps)

    def counter(self, model: Pipeline, images: Tensor, rng: ImageRng, sight: Sight) -> Countered:
        """Takes ``steps`` gradients."""

        def spread(at: Tensor) -> Tensor:
            logits = model(at, rng).logits
            return logits.shape[1] * logits.logsumexp(dim=1) - logits.sum(dim=1)  # sum over c of CE(logits, c)

        start = images if sight == "unrolled" else images.detach()
        moved = self.started(start, rng)
        unrolled = sight == "unrolled"
        for step in sign_ascent(
            spread, moved, start, eps=self.eps, alpha=self.alpha, steps=self.steps, unrolled=unrolled
        ):
            moved = step.images
        return Countered(shown(images, moved, sight))


class _Start(CounterAttacked):
    def __init__(self, defense: Hedge, model: Pipeline) -> None:
        super().__init__(defense, model, "cut")
        self.hedge = defense

    def __call__(self, images: Tensor, rng: ImageRng) -> Outputs:
        if not (images.requires_grad and torch.is_grad_enabled()):
            return super().__call__(images, rng)
        return self.model(self.hedge.started(images, rng), rng)
