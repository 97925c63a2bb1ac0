"""Resize and pad: shrinks the image by a random amount and places it at random."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from vlmdefend.defenses import DEFENSES
from vlmdefend.defenses.base import Defense, Paradigm, Recipe, TransformedInput
from vlmdefend.defenses.views.resample import Span, axis_weights, resample, whole
from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng
from vlmdefend.types import Pipeline, Shade


@DEFENSES.register
@dataclass(frozen=True, kw_only=True)
class ResizePad(Defense):
    """Shrink to a random size, pad with a constant to the size before, at a random place (Xie et al. 2018).

    Xie et al. enlarge 299 pixels to 299 to 330 and pad to 331. A CLIP model takes one size, so the image shrinks
    instead: to 200 to 224 of 224 pixels by default, the same share of any other side. Bilinear with antialias where
    they take the nearest pixel. One draw per prediction; the adaptive attacker averages over 20 (EOT).

    Options:
        smallest: the smallest side, as a share of the image's; 1 does nothing.
        fill: the constant around the image, in [0, 1].
    """

    name: ClassVar[str] = "resize_pad"
    paradigm: ClassVar[Paradigm] = "training-free"
    summary: ClassVar[str] = "the image shrunk at random, at a random place"
    citation: ClassVar[str] = "Xie et al. 2018"
    stochastic: ClassVar[bool] = True
    neutral: ClassVar[dict[str, Any] | None] = {"smallest": 1.0}
    recipe: ClassVar[Recipe] = Recipe("EOT: mean gradient over 20 draws", samples=20)
    smallest: float = 200 / 224
    fill: Shade = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.smallest <= 1 or not 0 <= self.fill <= 1:
            raise UserError(f"resize_pad: smallest={self.smallest} must be in (0, 1], fill={self.fill} in [0, 1].")

    def wrap(self, model: Pipeline) -> Pipeline:
        """Shrinks and places, then predicts."""
        return TransformedInput(model, self.place, stochastic=True)

    def place(self, images: Tensor, rng: ImageRng) -> Tensor:
        """Resizes (B, 3, H, W) and pads to the same size; one aspect ratio, a fresh draw per image."""
        draws = rng.uniform((3,)).to(images.device)
        axes = []
        for size, place in zip(images.shape[-2:], draws[:, 1:].unbind(dim=1), strict=True):
            least = min(size, math.ceil(self.smallest * size - 1e-9))
            side = least + (draws[:, 0] * (size - least + 1)).floor()
            start = (place * (size - side + 1)).floor()
            axes.append(axis_weights(size, whole(size, side), Span(start, side)))
        return resample(images - self.fill, *axes) + self.fill
