"""Anti-adversary: moves the image to where the model is more confident of its prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from vlmdefend.defenses import DEFENSES
from vlmdefend.defenses.base import Paradigm, Recipe
from vlmdefend.defenses.training_free._counter_attack import (
    CounterAttack,
    Countered,
    Sight,
    ascent_sign,
    pixel_gradient,
    shown,
)
from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng
from vlmdefend.types import Pipeline, PixelUnits


@DEFENSES.register
@dataclass(frozen=True, kw_only=True)
class AntiAdversary(CounterAttack):
    """gamma <- gamma - alpha sign(grad CE(f(x + gamma), y)), y the prediction on x (Alfarra et al. 2022, eq. 3).

    As in the official code the image may leave [0, 1] and no ball is kept; ``alpha`` counts in normalised units there,
    so that a step is larger in a channel of larger standard deviation.

    Options:
        steps: k, 2 in the official code.
        alpha: step size.
        normalized: ``alpha`` is in units of the model's pixel standard deviation, or (False) of [0, 1].
        clip: stay in [0, 1], which the official code does not.
    """

    name: ClassVar[str] = "anti_adversary"
    paradigm: ClassVar[Paradigm] = "training-free"
    summary: ClassVar[str] = "steps on the image towards the model's own answer"
    citation: ClassVar[str] = "Alfarra et al. 2022"
    neutral: ClassVar[dict[str, Any] | None] = {"steps": 0}
    recipe: ClassVar[Recipe] = Recipe(
        "BPDA: step constant, unrolled, or ignored, best per image", surrogates=2, bare=True
    )
    steps: int = 2
    alpha: PixelUnits = 0.15
    normalized: bool = True
    clip: bool = False

    def __post_init__(self) -> None:
        if self.steps < 0 or self.alpha < 0:
            raise UserError(f"anti_adversary: steps={self.steps} and alpha={self.alpha} must be zero or more.")
        if not self.normalized and self.alpha >= 1:
            raise UserError(
                f"anti_adversary: alpha={self.alpha:g} with normalized=False is as large as the whole pixel range "
                f"[0, 1]; did you mean {self.alpha:g}/255?"
            )

    def counter(self, model: Pipeline, images: Tensor, rng: ImageRng, sight: Sight) -> Countered:
        """Takes ``steps`` gradients; the first forward also gives the predicted class."""
        predicted: list[Tensor] = []

        def agreement(at: Tensor) -> Tensor:
            logits = model(at, rng).logits
            if not predicted:
                predicted.append(logits.argmax(dim=1))
            return -F.cross_entropy(logits, predicted[0], reduction="none")

        step, moved = self._step(model), images
        for _ in range(self.steps):
            gradient, _values = pixel_gradient(agreement, moved, unrolled=sight == "unrolled")
            moved = moved + step * ascent_sign(gradient)
            moved = moved.clamp(0.0, 1.0) if self.clip else moved
        return Countered(shown(images, moved, sight))

    def _step(self, model: Pipeline) -> float | Tensor:
        """The step in pixels of [0, 1], per channel."""
        if not self.normalized:
            return self.alpha
        deviation: Tensor | None = getattr(model, "std", None)
        if deviation is None:
            raise UserError(
                "anti_adversary: the model gives no mean and deviation of its pixels; use normalized=False and alpha "
                "in pixels of [0, 1]."
            )
        return self.alpha * deviation
