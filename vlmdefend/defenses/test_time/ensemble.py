"""Ensemble: the mean over augmented views, the control of prompt tuning."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from vlmdefend.defenses import DEFENSES
from vlmdefend.defenses.base import Defense, Paradigm, Recipe
from vlmdefend.defenses.views.crops import augmented_views, mean_score, most_confident, pick, predict_views
from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng
from vlmdefend.types import Outputs, Pipeline

TINY = 1e-12


@DEFENSES.register
@dataclass(frozen=True, kw_only=True)
class Ensemble(Defense):
    """Mean logits over the image and random resized crops of it: R-TPT's views without its tuning and weights.

    T-VSS and RITA list it as "Ensemble" (64 views, no filter). ``keep=0.1:average=votes`` is ZERO (Farina et al.
    2024): the confident views vote, ties go to the higher mean probability. Views are drawn anew at every prediction,
    as the published codes draw them for every image.

    The adaptive attacker climbs the mean over fresh views at every step (the EOT-PGD of T-VSS uses 8 views a step, this
    one all of them, twice); where views vote, it climbs the mean of their probabilities.

    Options:
        views: the image counts as one.
        keep: share of the views that counts, those of lowest entropy.
        average: logits, probabilities or votes.
        smallest: share of the area that a crop covers at least. The published 0.08 leaves crops in which a small image
            cannot be told; 0.5 is the control of methods whose weights prefer large crops, as R-TPT's and MTA's do.
        augmix: each crop is mixed with mild random changes of it, as R-TPT's code does on fine-grained sets, which are
            those of T-VSS and RITA. The codes of ZERO and MTA have crops and flips alone.
    """

    name: ClassVar[str] = "ensemble"
    paradigm: ClassVar[Paradigm] = "test-time adaptation"
    summary: ClassVar[str] = "mean logits over random crops, the control of prompt tuning"
    citation: ClassVar[str] = "control in T-VSS and RITA; votes: ZERO, Farina et al. 2024"
    stochastic: ClassVar[bool] = True
    neutral: ClassVar[dict[str, Any] | None] = {"views": 1}
    recipe: ClassVar[Recipe] = Recipe("EOT: fresh views at every step, mean gradient over 2 draws of them", samples=2)
    views: int = 64
    keep: float = 1.0
    average: Literal["logits", "probabilities", "votes"] = "logits"
    smallest: float = 0.08
    augmix: bool = False

    def __post_init__(self) -> None:
        if self.views < 1 or not 0 < self.keep <= 1:
            raise UserError(f"ensemble: views={self.views} must be at least 1, keep={self.keep} in (0, 1].")
        if not 0 < self.smallest <= 1:
            raise UserError(f"ensemble: smallest={self.smallest} must be in (0, 1].")

    def wrap(self, model: Pipeline) -> Pipeline:
        """Predicts the views and averages."""
        return _Averaged(model, self)

    def surrogate(self, model: Pipeline) -> Pipeline:
        """The same, with probabilities in place of votes, which have no gradient."""
        return replace(self, average="probabilities").wrap(model) if self.average == "votes" else self.wrap(model)

    def combine(self, logits: Tensor) -> Tensor:
        """Combines (B, V, C) logits of the chosen views into (B, C)."""
        if self.average == "logits":
            return logits.mean(dim=1)
        mean = logits.softmax(dim=-1).mean(dim=1)
        if self.average == "votes":
            votes = F.one_hot(logits.argmax(dim=-1), logits.shape[-1]).sum(dim=1)
            mean = (votes + mean) / (logits.shape[1] + 1)  # the mean, less than one vote, decides between ties
        return (mean + TINY).log()


class _Averaged:
    def __init__(self, model: Pipeline, defense: Ensemble) -> None:
        self.model, self.defense = model, defense
        self.num_classes = model.num_classes
        self.stochastic = True

    def __call__(self, images: Tensor, rng: ImageRng) -> Outputs:
        defense = self.defense
        views = augmented_views(images, rng, defense.views, area=(defense.smallest, 1.0), mixed=defense.augmix)
        seen = predict_views(self.model, views, rng)
        logits, features = seen.logits, seen.features
        if defense.keep < 1:
            chosen = most_confident(logits, defense.keep)
            logits, features = pick(logits, chosen), None if features is None else pick(features, chosen)
        return Outputs(defense.combine(logits), None if features is None else features.mean(dim=1), mean_score(seen))
