"""Gaussian blur of the image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlmdefend.defenses import DEFENSES
from vlmdefend.defenses.base import Defense, Paradigm, Recipe, TransformedInput
from vlmdefend.errors import UserError
from vlmdefend.types import Pipeline


@DEFENSES.register
@dataclass(frozen=True, kw_only=True)
class Blur(Defense):
    """Gaussian blur, cut off at three sigma, edges mirrored; a control in most training-free papers.

    ``sigma`` counts pixels of the image that the defense is given, whatever its size: the same sigma removes the same
    share of the frequencies an image of that size can hold, but at 32 pixels more of what it shows than at 224, where
    the literature uses 1 to 2. The default is nearly low_pass with its default radius (0.89 pixels), in space instead
    of in frequency. Linear: plain white-box gradients are exact.

    Options:
        sigma: standard deviation in pixels; 0 does nothing.
    """

    name: ClassVar[str] = "blur"
    paradigm: ClassVar[Paradigm] = "training-free"
    summary: ClassVar[str] = "Gaussian blur of the input"
    citation: ClassVar[str] = "control"
    neutral: ClassVar[dict[str, Any] | None] = {"sigma": 0.0}
    recipe: ClassVar[Recipe] = Recipe("exact: the filter is linear and differentiable")
    sigma: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.sigma <= 100:
            raise UserError(f"blur: sigma={self.sigma} must be 0 to 100 pixels.")

    def wrap(self, model: Pipeline) -> Pipeline:
        """Returns the model behind the blur."""
        return TransformedInput(model, lambda images, rng: self.blur(images))

    def blur(self, images: Tensor) -> Tensor:
        """Blurs (B, 3, H, W) images along both axes in turn."""
        height, width = images.shape[-2:]
        return self._kernel(height, images) @ images @ self._kernel(width, images).mT

    def _kernel(self, size: int, like: Tensor) -> Tensor:
        """Returns the (size, size) blur matrix of one axis, with the mass beyond the edges mirrored back."""
        reach = math.ceil(3 * self.sigma)
        offsets = torch.arange(-reach, reach + 1)
        weights = torch.exp(-0.5 * (offsets / max(self.sigma, 1e-6)) ** 2)
        period = max(1, 2 * (size - 1))
        places = (torch.arange(size)[:, None] + offsets) % period
        places = torch.where(places >= size, period - places, places)
        kernel = torch.zeros(size, size).scatter_add_(1, places, (weights / weights.sum()).expand(size, -1))
        return kernel.to(like)
