"""Random padding: shrinks the image into a border of random pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from vlmdefend.defenses import DEFENSES
from vlmdefend.defenses.base import Defense, Paradigm, Recipe, TransformedInput
from vlmdefend.defenses.views.border import framed
from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng
from vlmdefend.types import Pipeline, Shade


@DEFENSES.register
@dataclass(frozen=True, kw_only=True)
class RandomPad(Defense):
    """The image in the middle, a border of fresh uniform pixels around it: the start of TTP without its adaptation.

    TTP (2026, 2512.16523) pads a 224-pixel image by 32 on each side, values uniform in [0, 10]/255, and learns them.
    A CLIP model takes one size, so image and border together are shrunk to the image's size: the image keeps
    224/288 of its side. Here the random pixels are drawn after the shrinking. One draw per prediction; the adaptive
    attacker averages over 20 (EOT), though the border hardly matters.

    Options:
        border: width of the border on each side before shrinking, as a share of the image's side; 0 does nothing.
        brightest: border values are uniform in [0, brightest].
    """

    name: ClassVar[str] = "random_pad"
    paradigm: ClassVar[Paradigm] = "training-free"
    summary: ClassVar[str] = "the image shrunk into a border of random pixels"
    citation: ClassVar[str] = "TTP (2026), its padding alone"
    stochastic: ClassVar[bool] = True
    neutral: ClassVar[dict[str, Any] | None] = {"border": 0.0}
    recipe: ClassVar[Recipe] = Recipe("EOT: mean gradient over 20 draws of the border", samples=20)
    border: float = 32 / 224
    brightest: Shade = 10 / 255

    def __post_init__(self) -> None:
        if not 0 <= self.border <= 1 or not 0 <= self.brightest <= 1:
            raise UserError(
                f"random_pad: border={self.border} must be in [0, 1], and so must brightest={self.brightest}."
            )

    def wrap(self, model: Pipeline) -> Pipeline:
        """Shrinks, pads, predicts."""
        return TransformedInput(model, self.pad, stochastic=True)

    def pad(self, images: Tensor, rng: ImageRng) -> Tensor:
        """Pads (B, 3, H, W) with a fresh random border per image; the size stays."""
        border = rng.uniform(images.shape[1:], 0.0, self.brightest).to(images.device)
        return framed(images, border, self.border)
