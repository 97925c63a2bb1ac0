"""TTE: averages the logits over the image, its flip and shifted crops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmdefend.defenses import DEFENSES
from vlmdefend.defenses.base import Defense, Paradigm, Recipe
from vlmdefend.defenses.views.crops import mean_score, predict_views
from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng
from vlmdefend.types import Outputs, Pipeline


@DEFENSES.register
@dataclass(frozen=True, kw_only=True)
class Tte(Defense):
    """Test-time transformation ensembling: mean logits over image, flip, crops and flipped crops (Pérez et al. 2021).

    A crop pads the image with zeros and cuts its size out of that, which shifts it. The code pads 32 pixels by 4; here
    the pad is that share of any side, and a shift may reach it on both sides (the code never draws the last one). The
    crops are drawn once, so the defense is deterministic, and differentiable as it is: the plain white-box gradient is
    exact. The official code cuts the same crop n times, since its lambdas share the loop's variable:
    ``same_crop=yes`` repeats that.

    Options:
        crops: number of crops.
        flip: add the horizontal flip, and with it the flip of each crop.
        pad: the furthest shift, as a share of the image's side.
        same_crop: all crops are one, as in the official code.
        crop_seed: of the draw of the crops.
    """

    name: ClassVar[str] = "tte"
    paradigm: ClassVar[Paradigm] = "training-free"
    summary: ClassVar[str] = "mean logits over flip and shifted crops"
    citation: ClassVar[str] = "Pérez et al. 2021"
    neutral: ClassVar[dict[str, Any] | None] = {"crops": 0, "flip": False}
    recipe: ClassVar[Recipe] = Recipe("exact: a fixed average of differentiable views")
    crops: int = 4
    flip: bool = True
    pad: float = 4 / 32
    same_crop: bool = False
    crop_seed: int = 0

    def __post_init__(self) -> None:
        if self.crops < 0 or not 0 <= self.pad <= 1:
            raise UserError(f"tte: crops={self.crops} must be zero or more, pad={self.pad} in [0, 1].")
        if not 0 <= self.crop_seed < 2**63:
            raise UserError(f"tte: crop_seed={self.crop_seed} must be a whole number from 0 to 2**63 - 1.")

    def wrap(self, model: Pipeline) -> Pipeline:
        """Predicts all views, averages."""
        return _Averaged(model, self)

    def views(self, images: Tensor) -> Tensor:
        """Returns (B, V, 3, H, W) views of (B, 3, H, W): the image, then crops, then the flip of each of these."""
        height, width = images.shape[-2:]
        down, across = round(self.pad * height), round(self.pad * width)
        padded = F.pad(images, (across, across, down, down))
        places = torch.rand(self.crops, 2, generator=torch.Generator().manual_seed(self.crop_seed))
        if self.same_crop and self.crops:
            places = places[-1:].expand(self.crops, -1)
        views = [images]
        for vertical, horizontal in places.tolist():
            top, left = int(vertical * (2 * down + 1)), int(horizontal * (2 * across + 1))
            views.append(padded[..., top : top + height, left : left + width])
        views += [view.flip(-1) for view in views] if self.flip else []
        return torch.stack(views, dim=1)


class _Averaged:
    """Mean logits and mean features over the views."""

    def __init__(self, model: Pipeline, defense: Tte) -> None:
        self.model, self.defense = model, defense
        self.num_classes, self.stochastic = model.num_classes, model.stochastic

    def __call__(self, images: Tensor, rng: ImageRng) -> Outputs:
        views = predict_views(self.model, self.defense.views(images), rng)
        features = None if views.features is None else views.features.mean(dim=1)
        return Outputs(views.logits.mean(dim=1), features, mean_score(views))
