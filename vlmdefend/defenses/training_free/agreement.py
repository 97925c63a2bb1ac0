"""Agreement: a detector that compares the image's embedding with embeddings of mildly changed copies."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmdefend.defenses import DEFENSES
from vlmdefend.defenses.base import Defense, Paradigm, Recipe, features_of
from vlmdefend.defenses.training_free.low_pass import LowPass
from vlmdefend.defenses.training_free.tte import Tte
from vlmdefend.defenses.views.crops import predict_views
from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng
from vlmdefend.types import Outputs, Pipeline


@DEFENSES.register
@dataclass(frozen=True, kw_only=True)
class Agreement(Defense):
    """Score 1 - mean cos(z(x), z(x')) over changed images x'; images of high score are rejected.

    ``low_pass``: x' is the filtered image, as in the first stage of CSR. ``shifts``: x' are the flip and shifted crops
    of TTE, a deterministic view set. The prediction is the bare model's: what the detector is worth is read from
    accuracy against rejection, not from the robust accuracy without it. An attacker who knows it keeps the score low
    while the prediction turns, under several weights and once by selective descent (Bryniarski et al. 2022), goes on
    after the first iterate that fools, and keeps the least suspicious of all that do.

    Options:
        other: what the image is compared with.
        radius: of the low-pass filter, a fraction of the image side.
        crops: shifted crops.
    """

    name: ClassVar[str] = "agreement"
    paradigm: ClassVar[Paradigm] = "training-free"
    summary: ClassVar[str] = "detector: embeddings of the image and of its low-pass version or shifts differ"
    citation: ClassVar[str] = "control; low-pass as in CSR, 2601.19210"
    changes: ClassVar[str] = "nothing; may reject"
    rejects: ClassVar[bool] = True
    neutral: ClassVar[dict[str, Any] | None] = {}
    recipe: ClassVar[Recipe] = Recipe(
        "exact; a term that keeps the score low, three weights, and selective: once fooled the score alone; of all "
        "iterates the least suspicious that fools",
        detector_weights=(0.0, 10.0, 100.0, math.inf),
    )
    other: Literal["low_pass", "shifts"] = "low_pass"
    radius: float = 40 / 224
    crops: int = 4

    def __post_init__(self) -> None:
        if not self.radius > 0 or self.crops < 0:
            raise UserError(f"agreement: radius={self.radius} must be more than zero, crops={self.crops} zero or more.")

    def wrap(self, model: Pipeline) -> Pipeline:
        """Predicts the image and computes its score."""
        return _Scored(self, model)

    def views(self, images: Tensor) -> Tensor:
        """Returns (B, V, 3, H, W) views of (B, 3, H, W), the image first."""
        if self.other == "shifts":
            return Tte(crops=self.crops).views(images)
        return torch.stack([images, LowPass(radius=self.radius).filter(images)], dim=1)


class _Scored:
    def __init__(self, defense: Agreement, model: Pipeline) -> None:
        self.defense, self.model = defense, model
        self.num_classes, self.stochastic = model.num_classes, model.stochastic

    def __call__(self, images: Tensor, rng: ImageRng) -> Outputs:
        seen = predict_views(self.model, self.defense.views(images), rng)
        if seen.features is None:
            raise UserError("defense agreement compares image features; this model gives logits only.")
        z = F.normalize(features_of(seen), dim=-1)
        score = 1 - (z[:, :1] * z[:, 1:]).sum(dim=-1).mean(dim=1)
        return Outputs(seen.logits[:, 0], seen.features[:, 0], score)
