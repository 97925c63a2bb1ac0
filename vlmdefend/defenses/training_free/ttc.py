"""TTC: moves the embedding away from its place if a little noise hardly changes it (test-time counter-attack)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlmdefend.defenses import DEFENSES
from vlmdefend.defenses.base import Paradigm, Recipe
from vlmdefend.defenses.training_free._counter_attack import (
    CounterAttack,
    Countered,
    Sight,
    departure,
    noisy,
    relative,
    shown,
    sign_ascent,
)
from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng
from vlmdefend.types import Amplitude, Pipeline, per_image


@DEFENSES.register
@dataclass(frozen=True, kw_only=True)
class Ttc(CounterAttack):
    """Test-time counterattacks (Xing et al. 2025).

    delta_0 uniform in the eps-ball; delta_t by sign ascent on ||f(x + delta) - f(x)||^2, f not normalised; with
    tau = ||f(x + delta_0) - f(x)|| / ||f(x)||, the model sees x + sum_t softmax(beta t)_t delta_t where tau is below
    ``threshold`` ("falsely stable"), else x + delta_0: a clean image gets the noise too. All amplitudes are in pixels
    of [0, 1], whatever the image size. The official code takes tau from the original CLIP when the model is an
    adversarially trained one; here it is the model's own.

    Later papers find the threshold unstable and dispute its direction; ``threshold=9`` counter-attacks always.

    Options:
        eps: the defender's ball, L-infinity.
        alpha: step size.
        steps: N, at least 1.
        beta: how much later steps outweigh earlier ones.
        threshold: on tau.
    """

    name: ClassVar[str] = "ttc"
    paradigm: ClassVar[Paradigm] = "training-free"
    summary: ClassVar[str] = "a perturbation that moves a falsely stable embedding away"
    citation: ClassVar[str] = "Xing et al. 2025"
    stochastic: ClassVar[bool] = True
    neutral: ClassVar[dict[str, Any] | None] = {"eps": 0.0}
    recipe: ClassVar[Recipe] = Recipe(
        "BPDA: perturbation constant, unrolled, or ignored, best per image; EOT over 4 starts; tau pushed over the "
        "threshold",
        samples=4,
        detector_weights=(0.0, 5.0),
        surrogates=2,
        bare=True,
    )
    eps: Amplitude = 4 / 255
    alpha: Amplitude = 1 / 255
    steps: int = 2
    beta: float = 2.0
    threshold: float = 0.2

    def __post_init__(self) -> None:
        if self.eps < 0 or self.alpha < 0 or self.steps < 1:
            raise UserError(
                f"ttc: eps={self.eps} and alpha={self.alpha} must be zero or more, steps={self.steps} at least 1."
            )

    def counter(self, model: Pipeline, images: Tensor, rng: ImageRng, sight: Sight) -> Countered:
        """Takes one forward and ``steps`` gradients; tau comes with the first of them."""
        unrolled = sight == "unrolled"
        start = images if unrolled else images.detach()
        reference, away = departure(model, start, rng, graph=unrolled)
        first = noisy(start, rng, self.eps)
        steps = list(
            sign_ascent(away, first, start, eps=self.eps, alpha=self.alpha, steps=self.steps, unrolled=unrolled)
        )
        tau = relative(steps[0].values, reference)
        moved = [first, *(step.images for step in steps)]
        weights = torch.softmax(self.beta * torch.arange(len(moved), device=images.device), dim=0)
        countered = torch.stack([weight * image for weight, image in zip(weights, moved, strict=True)]).sum(dim=0)
        seen = torch.where(per_image(tau < self.threshold, images), countered, first)
        if sight == "constant":  # an attacker who wants the slope of tau pays for it
            reference, away = departure(model, images, rng, graph=True)
            tau = relative(away(images + (first - images).detach()), reference)
        return Countered(shown(images, seen, sight), self.threshold - tau)
