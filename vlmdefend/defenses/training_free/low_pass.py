"""Low-pass filter: keeps the image's low spatial frequencies."""

from __future__ import annotations

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
class LowPass(Defense):
    """Gaussian low-pass filter in the frequency domain: the control that several published defenses do not beat.

    The weight of a frequency at distance d (in cycles per image) is exp(-d^2 / (2 r^2)), r = radius x image side.
    The filter is linear: plain white-box gradients are exact.

    Options:
        radius: fraction of the image side; the default is 40 cycles at 224 pixels (CSR, 2026).
    """

    name: ClassVar[str] = "low_pass"
    paradigm: ClassVar[Paradigm] = "training-free"
    summary: ClassVar[str] = "Gaussian low-pass filter on the input"
    citation: ClassVar[str] = "control; radius as in CSR (2026)"
    neutral: ClassVar[dict[str, Any] | None] = {"radius": 1e6}
    recipe: ClassVar[Recipe] = Recipe("exact: the filter is linear and differentiable")
    radius: float = 40 / 224

    def __post_init__(self) -> None:
        if not self.radius > 0:
            raise UserError(f"low_pass: radius={self.radius} must be more than zero.")

    def wrap(self, model: Pipeline) -> Pipeline:
        """Filters, then predicts."""
        return TransformedInput(model, lambda images, rng: self.filter(images))

    def filter(self, images: Tensor) -> Tensor:
        """Filters (B, 3, H, W) images; the mean of each channel is kept."""
        height, width = images.shape[-2:]
        rows = torch.fft.fftfreq(height, device=images.device) * height  # cycles per image
        columns = torch.fft.rfftfreq(width, device=images.device) * width
        weight = torch.exp(
            -0.5 * ((rows[:, None] / (self.radius * height)) ** 2 + (columns / (self.radius * width)) ** 2)
        )
        filtered: Tensor = torch.fft.irfft2(torch.fft.rfft2(images) * weight, s=(height, width))
        return filtered
