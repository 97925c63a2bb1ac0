"""COLA-like: projects the views' embeddings onto the span of the class embeddings and matches by optimal transport."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmdefend.defenses import DEFENSES
from vlmdefend.defenses.base import Defense, Paradigm, Recipe, embedding_pipeline, features_of
from vlmdefend.defenses.views.crops import augmented_views, entropy, mean_score, predict_views
from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng
from vlmdefend.types import Outputs, Pipeline


@DEFENSES.register
@dataclass(frozen=True, kw_only=True)
class Cola(Defense):
    """The class of least transport cost between the image's views and the class's one text (after Zhu et al. 2025).

    The columns of U are the leading left singular vectors of the class embeddings (all of them by default, which is
    their span: where there are as many classes as dimensions nothing is projected). The cost of view n and class y is
    1 - cos(U U^T z_n, w_y); views weigh softmax(-entropy). The paper describes every class by many sentences of a
    language model, and solves an optimal transport; a class has its own prompt only here, so all mass goes to one
    point and the cost is the weighted mean: logits are s (1 - cost). No code is public; number of views and weights are
    our reading.

    Options:
        views: the image counts as one.
        rank: singular vectors kept; 0: all.
        project: False leaves the projection out.
    """

    name: ClassVar[str] = "cola"
    paradigm: ClassVar[Paradigm] = "training-free"
    summary: ClassVar[str] = "embeddings of crops projected onto the span of the class texts, weighted mean"
    citation: ClassVar[str] = "after Zhu et al. 2025, one text per class"
    changes: ClassVar[str] = "embedding"
    stochastic: ClassVar[bool] = True
    neutral: ClassVar[dict[str, Any] | None] = {"views": 1, "project": False}
    recipe: ClassVar[Recipe] = Recipe("exact; EOT: fresh views at every step, mean gradient over 2 draws", samples=2)
    views: int = 32
    rank: int = 0
    project: bool = True

    def __post_init__(self) -> None:
        if self.views < 1 or self.rank < 0:
            raise UserError(f"cola: views={self.views} must be at least 1, rank={self.rank} zero or more.")

    def wrap(self, model: Pipeline) -> Pipeline:
        """Embeds the views, projects, compares with the classes."""
        return _Projected(self, model)

    def basis(self, text_features: Tensor) -> Tensor:
        """Returns (D, R) orthonormal columns that span the (C, D) class embeddings."""
        left, values, _ = torch.linalg.svd(text_features.T, full_matrices=False)
        rank = int((values > 1e-5 * values[0]).sum())
        basis: Tensor = left[:, : min(self.rank or rank, rank)]
        return basis


class _Projected:
    def __init__(self, defense: Cola, model: Pipeline) -> None:
        self.defense, self.model = defense, embedding_pipeline(model, defense.name)
        self.num_classes, self.stochastic = model.num_classes, True
        self._basis: tuple[Tensor, Tensor] | None = None  # with the texts that it belongs to

    def __call__(self, images: Tensor, rng: ImageRng) -> Outputs:
        seen = predict_views(self.model, augmented_views(images, rng, self.defense.views), rng)
        features = features_of(seen)  # (B, V, D)
        if self.defense.project:
            basis = self._basis_of(self.model.text_features)
            features = features @ basis @ basis.T
        logits = self.model.logits(features)  # (B, V, C): scaled cosines
        weights = torch.softmax(-entropy(logits), dim=1)[..., None]
        mean = (weights * F.normalize(features, dim=-1)).sum(dim=1)
        return Outputs((weights * logits).sum(dim=1), mean, mean_score(seen))

    def _basis_of(self, text_features: Tensor) -> Tensor:
        if self._basis is None or self._basis[0] is not text_features:
            self._basis = text_features, self.defense.basis(text_features)
        return self._basis[1]
