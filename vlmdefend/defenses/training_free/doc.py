"""DOC: a counter-attack with momentum and a random direction beside the gradient, weighted by a soft gate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmdefend.defenses import DEFENSES
from vlmdefend.defenses.base import Paradigm, Recipe, features_of
from vlmdefend.defenses.training_free._counter_attack import (
    CounterAttack,
    Countered,
    Sight,
    ascent_sign,
    departure,
    pixel_gradient,
    shown,
)
from vlmdefend.defenses.training_free.ttc import Ttc
from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng
from vlmdefend.types import Amplitude, Pipeline, Threat, per_image


@DEFENSES.register
@dataclass(frozen=True, kw_only=True)
class Doc(CounterAttack):
    """Directional orthogonal counterattack (DOC, AAAI 2026, 2511.09064): TTC with a wider search and a soft gate.

    From delta_0 uniform in the eps-ball, ``steps`` times: g the unit gradient of ||f(x + delta) - f(x)||, r a standard
    normal draw less its part along g, of unit length; m <- momentum m + (1 - momentum)(g + aside r); delta <- the
    ball's nearest to delta + alpha sign(m). The model sees x + w delta + (1 - w) delta_0, w = sigmoid(sharpness
    (threshold - tau)), tau = 1 - the mean cosine of f(x + noise) to f(x) over ``draws`` of noise like delta_0.

    So what noise moves is counter-attacked less, as TTC has it; the paper's text says both that a low tau means clean
    and that w grows as tau falls, and we follow the formula. eps, alpha and the number of steps are the paper's. The
    other values are in a supplement that we have not seen; ours are guesses: ``threshold`` is what TTC's 0.2 of the
    relative distance is as a cosine, 0.2^2 / 2.

    Options:
        eps: the defender's ball, L-infinity.
        alpha: step size.
        steps: at least 1.
        aside: lambda, how much of the random direction beside the gradient.
        momentum: mu.
        threshold, sharpness: tau and gamma of the gate.
        draws: M, of the noise in the gate's statistic.
    """

    name: ClassVar[str] = "doc"
    paradigm: ClassVar[Paradigm] = "training-free"
    summary: ClassVar[str] = "TTC with momentum, a random direction beside the gradient, and a soft gate"
    citation: ClassVar[str] = "DOC, AAAI 2026"
    stochastic: ClassVar[bool] = True
    neutral: ClassVar[dict[str, Any] | None] = {"eps": 0.0}
    recipe: ClassVar[Recipe] = Ttc.recipe._replace(detector_weights=(0.0, 50.0))
    eps: Amplitude = 4 / 255
    alpha: Amplitude = 3 / 255
    steps: int = 4
    aside: float = 0.5
    momentum: float = 0.5
    threshold: float = 0.02
    sharpness: float = 200.0
    draws: int = 4

    def __post_init__(self) -> None:
        if self.eps < 0 or self.alpha < 0 or self.steps < 1 or self.draws < 1:
            raise UserError(
                f"doc: eps={self.eps} and alpha={self.alpha} must be zero or more, steps={self.steps} and "
                f"draws={self.draws} at least 1."
            )
        if not 0 <= self.momentum < 1:
            raise UserError(f"doc: momentum={self.momentum} must be in [0, 1).")

    def counter(self, model: Pipeline, images: Tensor, rng: ImageRng, sight: Sight) -> Countered:
        """Takes 1 + ``draws`` forwards and ``steps`` gradients."""
        unrolled = sight == "unrolled"
        start = images if unrolled else images.detach()
        noise = rng.uniform((self.draws + 1, *images.shape[1:]), -self.eps, self.eps).to(images)
        reference, away = departure(model, start, rng, graph=unrolled)
        with torch.set_grad_enabled(torch.is_grad_enabled() and unrolled):
            tau = self.unrest(model, start, reference, noise[:, 1:], rng)

        def distance(at: Tensor) -> Tensor:
            return away(at).clamp_min(1e-24).sqrt()

        ball, first = Threat("linf", self.eps), (start + noise[:, 0]).clamp(0.0, 1.0)
        moved, average = first, torch.zeros_like(images)
        for _ in range(self.steps):
            gradient, _values = pixel_gradient(distance, moved, unrolled=unrolled)
            average = self.momentum * average + (1 - self.momentum) * self.widened(gradient, rng)
            moved = ball.project(moved + self.alpha * ascent_sign(average), start)
        share = per_image(torch.sigmoid(self.sharpness * (self.threshold - tau)), images)
        seen = share * moved + (1 - share) * first
        if sight == "constant":  # an attacker who wants the slope of tau pays for it
            tau = self.unrest(model, images, features_of(model(images, rng)), noise[:, 1:], rng)
        return Countered(shown(images, seen, sight), self.threshold - tau)

    def unrest(self, model: Pipeline, images: Tensor, reference: Tensor, noise: Tensor, rng: ImageRng) -> Tensor:
        """Returns (B,) 1 - mean cosine between features with and without (B, M, 3, H, W) noise."""
        cosines = [
            F.cosine_similarity(features_of(model((images + draw).clamp(0.0, 1.0), rng)), reference, dim=1)
            for draw in noise.unbind(dim=1)
        ]
        return 1 - torch.stack(cosines).mean(dim=0)

    def widened(self, gradient: Tensor, rng: ImageRng) -> Tensor:
        """Returns the unit gradient plus ``aside`` times a random unit direction orthogonal to it."""
        along = F.normalize(gradient.flatten(1), dim=1)
        drawn = rng.normal(along.shape[1:]).to(along)
        drawn = F.normalize(drawn - (drawn * along).sum(dim=1, keepdim=True) * along, dim=1)
        return (along + self.aside * drawn).view_as(gradient)
