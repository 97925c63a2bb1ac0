"""JPEG compression of the image before the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg

from vlmdefend.attacks.bpda import bpda
from vlmdefend.defenses import DEFENSES
from vlmdefend.defenses.base import Defense, Paradigm, Recipe, TransformedInput
from vlmdefend.defenses.training_free._jpeg_surrogate import jpeg_surrogate
from vlmdefend.errors import UserError
from vlmdefend.types import Pipeline


@DEFENSES.register
@dataclass(frozen=True, kw_only=True)
class Jpeg(Defense):
    """JPEG compression of the input (Dziugaite et al. 2016; Guo et al. 2018).

    The 8-bit rounding and the codec stop the gradient, so plain white-box attacks see zeros. The adaptive attacker
    keeps the codec's values and takes the gradient of a differentiable JPEG (BPDA). The identity as surrogate, which
    most papers use, is clearly weaker, not least because the codec halves the chroma resolution.

    Options:
        quality: 1 to 100, as libjpeg counts.
    """

    name: ClassVar[str] = "jpeg"
    paradigm: ClassVar[Paradigm] = "training-free"
    summary: ClassVar[str] = "JPEG compression of the input"
    citation: ClassVar[str] = "Dziugaite et al. 2016"
    recipe: ClassVar[Recipe] = Recipe("BPDA: the codec's values, the gradient of a differentiable JPEG")
    quality: int = 75

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 100:
            raise UserError(f"jpeg: quality={self.quality} must be 1 to 100.")

    def wrap(self, model: Pipeline) -> Pipeline:
        """Compresses, decompresses, predicts."""
        return TransformedInput(model, lambda images, rng: self.compress(images))

    def surrogate(self, model: Pipeline) -> Pipeline:
        """The codec's values, with the gradient of a differentiable JPEG."""
        transform = bpda(self.compress, lambda images: jpeg_surrogate(images, self.quality))
        return TransformedInput(model, lambda images, rng: transform(images))

    def compress(self, images: Tensor) -> Tensor:
        """Rounds (B, 3, H, W) in [0, 1] to 8 bits and compresses them as JPEG; no gradient."""
        levels = (images.detach() * 255).round().to("cpu", torch.uint8)
        files = encode_jpeg(list(levels), quality=self.quality)
        decoded = torch.stack([decode_jpeg(file, mode=ImageReadMode.RGB) for file in files])
        return decoded.to(images.device, images.dtype) / 255
