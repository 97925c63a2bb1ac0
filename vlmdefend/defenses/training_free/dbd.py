"""DBD: shifts the image embedding by the mean difference between augmented views and the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmdefend.defenses import DEFENSES
from vlmdefend.defenses.base import Defense, Paradigm, Recipe, embedding_pipeline, features_of
from vlmdefend.defenses.views.crops import augmented_views, mean_score, most_confident, pick, predict_views
from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng
from vlmdefend.types import Outputs, Pipeline


@DEFENSES.register
@dataclass(frozen=True, kw_only=True)
class Dbd(Defense):
    """f + k d, d = mean_i (f_i - f) over the confident views; k is 2.5 where the views agree on d, else 1 (Liu 2026).

    f is the image's feature, f_i those of random crops, none normalised; of ``views`` crops the ``keep`` of lowest
    entropy count. The views agree where the mean cosine of f_i - f to d is above ``threshold``, which is taken as the
    sign of an adversarial image. At k = 1 the result is the mean of the views; above, it extrapolates beyond it. As in
    the official code, but with the classes' own prompts: the published numbers use class descriptions written by a
    language model.

    Extrapolation is the way in: what moves the crops away from the image counts 2.5 times. The gate has no gradient,
    so a gradient at k = 1 never finds it; the adaptive attacker takes that of a constant k, ``factor`` on the confident
    crops or half of the way there on all, and the exact one, which serves where the gate is hardly ever open.

    Options:
        views: random crops, 32.
        keep: share of them that counts, 16 of 32.
        threshold: on the agreement.
        factor: k where the views agree.
    """

    name: ClassVar[str] = "dbd"
    paradigm: ClassVar[Paradigm] = "training-free"
    summary: ClassVar[str] = "moves the embedding towards, or past, the mean of confident crops"
    citation: ClassVar[str] = "Liu et al. 2026"
    changes: ClassVar[str] = "embedding"
    stochastic: ClassVar[bool] = True
    neutral: ClassVar[dict[str, Any] | None] = {"views": 0}
    recipe: ClassVar[Recipe] = Recipe(
        "BPDA: gradient as if the factor always held, on the confident crops, or half of it on all, or exact, best per "
        "image; EOT: fresh views at every step",
        surrogates=3,
    )
    views: int = 32
    keep: float = 0.5
    threshold: float = 0.8
    factor: float = 2.5

    def __post_init__(self) -> None:
        if self.views < 0 or not 0 < self.keep <= 1:
            raise UserError(f"dbd: views={self.views} must be zero or more, keep={self.keep} in (0, 1].")

    def wrap(self, model: Pipeline) -> Pipeline:
        """Embeds image and views, shifts, compares with the classes."""
        return _Shifted(self, model)

    def surrogate(self, model: Pipeline) -> Pipeline:
        """The deployed values, with the gradient of the full factor."""
        return _Shifted(self, model, "factor")

    def surrogates(self, model: Pipeline) -> tuple[Pipeline, ...]:
        """Returns surrogates with the gradient of the full factor, of half of it over all crops, and of what is
        deployed.
        """
        return self.surrogate(model), _Shifted(self, model, "half"), _Shifted(self, model, "exact")

    def shift(self, features: Tensor, crops: Tensor) -> tuple[Tensor, Tensor]:
        """Returns shifted (B, D) features and the (B,) agreement of the (B, V, D) views."""
        biases = crops - features[:, None]
        mean = biases.mean(dim=1)
        agreement = F.cosine_similarity(biases, mean[:, None], dim=-1).mean(dim=1)
        factor = torch.where(agreement > self.threshold, self.factor, 1.0)
        return features + factor[:, None] * mean, agreement


class _Shifted:
    """``gradient``: of what is deployed, of the factor on the confident crops, or of half of it on all crops."""

    def __init__(self, defense: Dbd, model: Pipeline, gradient: Literal["exact", "factor", "half"] = "exact") -> None:
        self.defense, self.model, self.gradient = defense, embedding_pipeline(model, defense.name), gradient
        self.num_classes, self.stochastic = model.num_classes, True

    def __call__(self, images: Tensor, rng: ImageRng) -> Outputs:
        defense = self.defense
        if not defense.views:
            return self.model(images, rng)
        seen = predict_views(self.model, augmented_views(images, rng, 1 + defense.views), rng)
        features = features_of(seen)
        image, crops = features[:, 0], features[:, 1:]
        confident = pick(crops, most_confident(seen.logits[:, 1:], defense.keep))
        shifted, agreement = defense.shift(image, confident)
        logits = self.model.logits(shifted)
        if self.gradient != "exact" and logits.requires_grad:
            factor, mean = (
                (defense.factor, confident.mean(dim=1))
                if self.gradient == "factor"
                else ((1 + defense.factor) / 2, crops.mean(dim=1))
            )
            surrogate = self.model.logits(image + factor * (mean - image))
            logits = surrogate + (logits - surrogate).detach()
        behind = mean_score(seen)  # this one's own, which chooses the factor, is not what an attacker quiets
        return Outputs(logits, shifted, agreement - defense.threshold if behind is None else behind)
