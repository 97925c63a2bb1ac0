"""Turns a picture into pixels in [0, 1]: open_clip's evaluation preprocessing without the normalisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from vlmdefend.data.base import BadImage
from vlmdefend.errors import UserError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

MOST_PIXELS = 200_000_000
"""A 1 x 30000 strip resized to a shorter side of 224 would take 1.5 billion pixels before the crop."""


@dataclass(frozen=True)
class PixelTransform:
    """Turns a picture into (3, H, W) float32 in [0, 1], every value k/255 of an 8-bit level k.

    Args:
        size: shorter side in pixels after resizing, and the side of the square cut from the centre; None leaves
            the picture at its own size.
        interpolation: ``bicubic`` or ``bilinear``, antialiased, on the 8-bit picture.
    """

    size: int | None
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise UserError(f"image size {self.size}: give a side of at least 1 pixel, or none for native pixels.")
        if self.interpolation not in ("bicubic", "bilinear"):
            raise UserError(f"interpolation {self.interpolation!r} is not known; give bicubic or bilinear.")

    def __call__(self, image: Image.Image) -> Tensor:
        """Resizes, crops and scales one RGB picture.

        Raises:
            BadImage: the picture is so long and thin that resizing it would not fit in memory.
        """
        import numpy as np
        import torch

        if self.size is not None:
            image = self._crop(image, self.size)
        pixels = torch.from_numpy(np.array(image))  # (H, W, 3) uint8, a copy
        return pixels.permute(2, 0, 1).contiguous().float().div_(255)

    def _crop(self, image: Image.Image, size: int) -> Image.Image:
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms import functional as F

        shorter, longer = sorted(image.size)
        if size * size * longer // shorter > MOST_PIXELS:
            raise BadImage(
                f"{image.width} x {image.height} pixels are too long and thin to resize to {size}; "
                "crop the image, or leave it out with --skip-bad."
            )
        resized = F.resize(image, size, InterpolationMode(self.interpolation), antialias=True)
        cropped: Image.Image = F.center_crop(resized, size)
        return cropped
