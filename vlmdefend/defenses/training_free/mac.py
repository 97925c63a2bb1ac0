"""MAC: counter-attacks the image and a changed copy, each as strongly as its embedding is unstable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlmdefend.defenses import DEFENSES
from vlmdefend.defenses.base import Defense, Paradigm, Recipe, features_of
from vlmdefend.defenses.training_free._counter_attack import Sight, departure, noisy, relative, shown, sign_ascent
from vlmdefend.defenses.views.crops import predict_views
from vlmdefend.defenses.views.mild_changes import mildly_changed
from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng
from vlmdefend.types import Amplitude, Outputs, Pipeline, per_image


@DEFENSES.register
@dataclass(frozen=True, kw_only=True)
class Mac(Defense):
    """Multi-view guided adaptive counterattack (Kim, CVPR 2026, 2606.06938, and the official code).

    Views are the image and ``views`` - 1 mildly changed copies of it (see ``_mild_changes``). From a delta_0 uniform in
    the eps-ball, ``steps`` sign steps of eps / ``steps`` climb ||f(v + delta) - f(v)||^2 for each view. A further
    change T gives the corruption d = ||f(T v) - f(v)|| / ||f(v)||, and the model sees v + w delta, w = sigmoid((d -
    threshold) / temperature); logits are averaged. Unlike TTC it counter-attacks what moves; what changes move less
    than ``threshold`` is predicted next to as it is.

    Amplitudes are in pixels of [0, 1]; ``threshold`` belongs to a model and an image size. The paper attacks its own
    defense with the perturbation held constant (BPDA), which leaves 17.5 of 45.2 %.

    Options:
        eps: the defender's ball, L-infinity.
        steps: of the counter-attack, at least 1.
        views: the image counts as one.
        threshold, temperature: of the gate, on d.
    """

    name: ClassVar[str] = "mac"
    paradigm: ClassVar[Paradigm] = "training-free"
    summary: ClassVar[str] = "counter-attacks on the image and a changed copy, where changes move the embedding"
    citation: ClassVar[str] = "Kim, CVPR 2026"
    stochastic: ClassVar[bool] = True
    follows_gradient: ClassVar[bool] = True
    neutral: ClassVar[dict[str, Any] | None] = {"eps": 0.0, "views": 1}
    recipe: ClassVar[Recipe] = Recipe(
        "BPDA: perturbations constant, unrolled, or ignored, best per image; EOT over 4 draws; corruption pushed under "
        "the threshold",
        samples=4,
        detector_weights=(0.0, 5.0),
        surrogates=2,
        bare=True,
    )
    eps: Amplitude = 8 / 255
    steps: int = 4
    views: int = 2
    threshold: float = 0.7
    temperature: float = 0.01

    def __post_init__(self) -> None:
        if self.eps < 0 or self.steps < 1 or self.views < 1:
            raise UserError(
                f"mac: eps={self.eps} must be zero or more, steps={self.steps} and views={self.views} at least 1."
            )
        if not self.temperature > 0:
            raise UserError(f"mac: temperature={self.temperature} must be more than zero.")

    def wrap(self, model: Pipeline) -> Pipeline:
        """Counter-attacks the views, averages."""
        return _Countered(self, model, "cut")

    def surrogate(self, model: Pipeline) -> Pipeline:
        """Treats the perturbations as constants, drawn and computed anew at every call."""
        return _Countered(self, model, "constant")

    def surrogates(self, model: Pipeline) -> tuple[Pipeline, ...]:
        """Returns the constant and the unrolled surrogate."""
        return self.surrogate(model), _Countered(self, model, "unrolled")


class _Countered:
    def __init__(self, defense: Mac, model: Pipeline, sight: Sight) -> None:
        self.defense, self.model, self.sight = defense, model, sight
        self.num_classes, self.stochastic = model.num_classes, True

    def __call__(self, images: Tensor, rng: ImageRng) -> Outputs:
        """2 forwards and ``steps`` gradients of each view, and a forward of what the model is shown."""
        defense, unrolled = self.defense, self.sight == "unrolled"
        views = torch.stack([images, *(mildly_changed(images, rng) for _ in range(defense.views - 1))], dim=1)
        flat, streams = views.flatten(0, 1), rng.select(torch.arange(len(images)).repeat_interleave(defense.views))
        further = mildly_changed(flat, streams)
        start = flat if unrolled else flat.detach()
        reference, away = departure(self.model, start, streams, graph=unrolled)
        with torch.set_grad_enabled(torch.is_grad_enabled() and unrolled):
            corruption = relative(away(further), reference)
        moved, eps, steps = noisy(start, streams, defense.eps), defense.eps, defense.steps
        for step in sign_ascent(away, moved, start, eps=eps, alpha=eps / steps, steps=steps, unrolled=unrolled):
            moved = step.images
        share = torch.sigmoid((corruption - defense.threshold) / defense.temperature)
        seen = shown(flat, start + per_image(share, flat) * (moved - start), self.sight)
        if self.sight == "constant":  # an attacker who wants the slope of the corruption pays for it
            reference, away = departure(self.model, flat, streams, graph=True)
            corruption = relative(away(further), reference)
        found = predict_views(self.model, seen.view_as(views), rng)
        score = corruption.view(len(images), -1).mean(dim=1) - defense.threshold
        return Outputs(found.logits.mean(dim=1), features_of(found).mean(dim=1), score)
