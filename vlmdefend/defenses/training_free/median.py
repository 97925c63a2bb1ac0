"""Median filter: replaces each pixel by the median of its neighbourhood."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmdefend.attacks.bpda import bpda
from vlmdefend.defenses import DEFENSES
from vlmdefend.defenses.base import Defense, Paradigm, Recipe, TransformedInput
from vlmdefend.errors import UserError
from vlmdefend.types import Pipeline


@DEFENSES.register
@dataclass(frozen=True, kw_only=True)
class Median(Defense):
    """Median over a square window, per channel, edges mirrored (Xu et al. 2018).

    Autograd sees the pixel that is the median and none of its neighbours, though a perturbation of the attack's size
    changes which one it is: the exact gradient is sparse and holds for tiny steps only. The adaptive attacker keeps
    the median's values and takes the gradient of a mean weighted by closeness to the median,
    w_i = exp(-|x_i - median| / softness), which reaches every pixel that could become the median.

    Options:
        size: side of the window in pixels, odd; the literature uses 3 at 224 pixels, so smaller images lose more.
    """

    name: ClassVar[str] = "median"
    paradigm: ClassVar[Paradigm] = "training-free"
    summary: ClassVar[str] = "median filter on the input"
    citation: ClassVar[str] = "Xu et al. 2018"
    neutral: ClassVar[dict[str, Any] | None] = {"size": 1}
    recipe: ClassVar[Recipe] = Recipe("BPDA: the median's values, the gradient of a mean of the pixels close to it")
    softness: ClassVar[float] = 2 / 255
    size: int = 3

    def __post_init__(self) -> None:
        if self.size < 1 or self.size % 2 == 0:
            raise UserError(f"median: size={self.size} must be an odd number of pixels, such as 3.")

    def wrap(self, model: Pipeline) -> Pipeline:
        """Filters, then predicts."""
        return TransformedInput(model, lambda images, rng: self.filter(images))

    def surrogate(self, model: Pipeline) -> Pipeline:
        """The median's values, with the gradient of a soft median."""
        transform = bpda(self.filter, self.soft_filter)
        return TransformedInput(model, lambda images, rng: transform(images))

    def filter(self, images: Tensor) -> Tensor:
        """Returns (B, 3, H, W) with each pixel the median of its window."""
        return self._windows(images).median(dim=-1).values

    def soft_filter(self, images: Tensor) -> Tensor:
        """Replaces pixels by the mean of their window, weighted by closeness to its median; constant weights."""
        windows = self._windows(images)
        apart = (windows - windows.median(dim=-1, keepdim=True).values).abs().detach()
        return (windows * (-apart / self.softness).softmax(dim=-1)).sum(dim=-1)

    def _windows(self, images: Tensor) -> Tensor:
        """Returns the (B, 3, H, W, size^2) windows around each pixel."""
        reach = self.size // 2
        if reach >= min(images.shape[-2:]):
            height, width = images.shape[-2:]
            raise UserError(f"median: size={self.size} is too large for images of {height}x{width}; choose less.")
        padded = F.pad(images, (reach,) * 4, mode="reflect")
        windows: Tensor = padded.unfold(2, self.size, 1).unfold(3, self.size, 1)
        return torch.flatten(windows, -2)
