"""MTA: the mode of the augmented views' embeddings, by a mean shift that also learns view weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmdefend.defenses import DEFENSES
from vlmdefend.defenses.base import Defense, Paradigm, Recipe, features_of
from vlmdefend.defenses.views.crops import augmented_views, mean_score, predict_views
from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng
from vlmdefend.types import Outputs, Pipeline

LARGE = (0.5, 1.0)  # shares of the area that the crops of the surrogate cover


@DEFENSES.register
@dataclass(frozen=True, kw_only=True)
class Mta(Defense):
    """MeanShift for test-time augmentation (Zanella & Ben Ayed, CVPR 2024, algorithm 1 and the official code).

    Of V views with unit embeddings z_i and probabilities p_i: bandwidths h_i^2 = half the mean squared distance to the
    nearest ``neighbours`` of the views; from the mode m = z_0 and the inlierness y = 1/V repeat ``rounds`` times

        y <- softmax((K + smoothness P y) / sharpness),   P_ij = p_i . p_j, K_i = exp(-|m - z_i|^2 / (2 h_i^2))
        m <- the unit vector along sum_i K_i y_i z_i

    each line ``repeats`` times. The paper's lambda_y is ``sharpness``, its lambda_q ``smoothness``. As the code, but
    without its stop at a change below 1e-6, which predictions hardly notice. m predicts. Logits are linear in the unit
    embedding, up to a constant that the classes share, so those of m are the views' logits in the proportions in which
    m is made of the views: no access to the text side is needed.

    No parameter changes. All of it is differentiable, yet the unrolled gradient, which is what autograd sees, serves an
    attacker less than the bare model's. The mode is made of large crops mostly; the adaptive attacker fools the plain
    mean over large crops, or holds the proportions constant, or attacks the bare model.

    Options:
        views: the image counts as one.
        rounds, repeats: iterations, 5 and 5 in the code.
        neighbours: share of the views that sets the bandwidth.
        sharpness: temperature of the inlierness.
        smoothness: how much views that predict alike vouch for each other.
    """

    name: ClassVar[str] = "mta"
    paradigm: ClassVar[Paradigm] = "test-time adaptation"
    summary: ClassVar[str] = "mean shift over the embeddings of random crops"
    citation: ClassVar[str] = "Zanella & Ben Ayed, CVPR 2024"
    changes: ClassVar[str] = "embedding"
    stochastic: ClassVar[bool] = True
    neutral: ClassVar[dict[str, Any] | None] = {"views": 1}
    recipe: ClassVar[Recipe] = Recipe(
        "BPDA: gradient of the plain mean over large crops, with constant proportions, or of the bare model, best per "
        "image; EOT: fresh views at every step",
        surrogates=2,
        bare=True,
    )
    views: int = 64
    rounds: int = 5
    repeats: int = 5
    neighbours: float = 0.3
    sharpness: float = 0.2
    smoothness: float = 4.0

    def __post_init__(self) -> None:
        if min(self.views, self.rounds, self.repeats) < 1:
            raise UserError(
                f"mta: views={self.views}, rounds={self.rounds} and repeats={self.repeats} must be at least 1."
            )
        if not 0 < self.neighbours <= 1 or not self.sharpness > 0 or self.smoothness < 0:
            raise UserError(
                f"mta: neighbours={self.neighbours} must be in (0, 1], sharpness={self.sharpness} more than zero, "
                f"smoothness={self.smoothness} zero or more."
            )

    def wrap(self, model: Pipeline) -> Pipeline:
        """Predicts the views and finds their mode."""
        return _Mode(model, self)

    def surrogate(self, model: Pipeline) -> Pipeline:
        """The deployed values, with the gradient of the plain mean over large crops."""
        return _Mode(model, self, "large")

    def surrogates(self, model: Pipeline) -> tuple[Pipeline, ...]:
        """Returns two surrogates: the mean over large crops, and constant proportions."""
        return self.surrogate(model), _Mode(model, self, "constant")

    def shares(self, features: Tensor, logits: Tensor) -> Tensor:
        """Returns (B, V) the weight of each view's unit embedding in the mode."""
        units = F.normalize(features, dim=-1)
        count = units.shape[1]
        if count == 1:
            return torch.ones_like(units[..., 0])
        apart = (2 - 2 * units @ units.mT).clamp_min(0.0)
        nearest = apart.sort(dim=-1).values[..., 1 : 1 + max(1, int(self.neighbours * (count - 1)))]
        squared_bandwidth = (0.5 * nearest.mean(dim=-1)).clamp_min(1e-8)
        alike = logits.softmax(dim=-1)
        alike = alike @ alike.mT
        inlierness = torch.full_like(units[..., 0], 1 / count)
        mode, share = units[:, 0], inlierness

        def kernel(mode: Tensor) -> Tensor:
            return (-(2 - 2 * units @ mode[..., None])[..., 0].clamp_min(0.0) / (2 * squared_bandwidth)).exp()

        for _ in range(self.rounds):
            density = kernel(mode)
            for _ in range(self.repeats):
                vouched = (alike @ inlierness[..., None])[..., 0]
                inlierness = ((density + self.smoothness * vouched) / self.sharpness).softmax(dim=-1)
            for _ in range(self.repeats):
                share = kernel(mode) * inlierness
                along = (share[:, None] @ units)[:, 0]
                length = along.norm(dim=-1, keepdim=True).clamp_min(1e-30)
                mode, share = along / length, share / length
        return share


class _Mode:
    """``gradient``: through everything, with constant proportions, or of the plain mean over other, large crops."""

    def __init__(
        self, model: Pipeline, defense: Mta, gradient: Literal["unrolled", "constant", "large"] = "unrolled"
    ) -> None:
        self.model, self.defense, self.gradient = model, defense, gradient
        self.num_classes = model.num_classes
        self.stochastic = True

    def __call__(self, images: Tensor, rng: ImageRng) -> Outputs:
        if self.gradient == "large" and images.requires_grad and torch.is_grad_enabled():
            return self._large(images, rng)
        views = predict_views(self.model, augmented_views(images, rng, self.defense.views), rng)
        if views.features is None:
            raise UserError("mta: the model gives no image features to find a mode of; use defense ensemble.")
        share = self.defense.shares(views.features, views.logits)[:, None]
        share = share if self.gradient == "unrolled" else share.detach()
        mode = (share @ F.normalize(views.features, dim=-1))[:, 0]
        return Outputs((share @ views.logits)[:, 0], mode, mean_score(views))

    def _large(self, images: Tensor, rng: ImageRng) -> Outputs:
        views = augmented_views(images, rng, self.defense.views, area=LARGE)
        seen = predict_views(self.model, views, rng)
        mean = F.normalize(features_of(seen), dim=-1).mean(dim=1)
        return Outputs(seen.logits.mean(dim=1), mean, mean_score(seen))
