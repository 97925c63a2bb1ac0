"""Hedge defense: perturb the image away from all classes at once, so that the attack's own edge gives way first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

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
from vlmdefend.types import Pipeline


@DEFENSES.register
@dataclass(frozen=True, kw_only=True)
class Hedge(CounterAttack):
    """delta = argmax over |delta| <= eps of sum_c CE(f(x + delta), c), by PGD from a random start (Wu et al. 2021).

    The defaults are the official code's for CIFAR (eps 0.031, step 0.007, 20 steps); on CLIP papers say no more than
    "original hyper-parameters". They are pixel amplitudes and do not depend on the image size.

    Options:
        eps: the defender's ball, L-infinity in pixels of [0, 1].
        alpha: step size.
        steps: gradient steps.
    """

    name: ClassVar[str] = "hedge"
    paradigm: ClassVar[Paradigm] = "training-free"
    summary: ClassVar[str] = "a perturbation that raises the cross-entropy of all classes"
    citation: ClassVar[str] = "Wu et al. 2021"
    evidence: ClassVar[str] = "others report 0.5 to 1.4 % at 4/255; not measured here against an adaptive attacker"
    stochastic: ClassVar[bool] = True
    neutral: ClassVar[dict[str, Any] | None] = {"eps": 0.0}
    recipe: ClassVar[Recipe] = Recipe(
        "BPDA: perturbation constant, unrolled, or ignored, best per image; EOT over 2 random starts",
        samples=2,
        surrogates=2,
        bare=True,
    )
    eps: float = 8 / 255
    alpha: float = 0.007
    steps: int = 20

    def __post_init__(self) -> None:
        if self.eps < 0 or self.alpha < 0 or self.steps < 0:
            raise UserError(f"hedge: eps={self.eps}, alpha={self.alpha} and steps={self.steps} must be zero or more.")

    def counter(self, model: Pipeline, images: Tensor, rng: ImageRng, sight: Sight) -> Countered:
        """``steps`` gradients."""

        def spread(at: Tensor) -> Tensor:
            logits = model(at, rng).logits
            return logits.shape[1] * logits.logsumexp(dim=1) - logits.sum(dim=1)  # sum over c of CE(logits, c)

        start = images if sight == "unrolled" else images.detach()
        noise = rng.uniform(images.shape[1:], -self.eps, self.eps).to(images.device)
        moved = (start + noise).clamp(0.0, 1.0)
        for _ in range(self.steps):
            gradient, _values = pixel_gradient(spread, moved, unrolled=sight == "unrolled")
            delta = (moved + self.alpha * ascent_sign(gradient) - start).clamp(-self.eps, self.eps)
            moved = (start + delta).clamp(0.0, 1.0)
        return Countered(shown(images, moved, sight))
