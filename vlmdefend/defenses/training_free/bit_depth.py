"""Bit depth: rounds each colour channel to few levels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from vlmdefend.attacks.bpda import bpda
from vlmdefend.defenses import DEFENSES
from vlmdefend.defenses.base import Defense, Paradigm, Recipe, TransformedInput
from vlmdefend.errors import UserError
from vlmdefend.types import Pipeline


@DEFENSES.register
@dataclass(frozen=True, kw_only=True)
class BitDepth(Defense):
    """Round each channel to 2^bits evenly spaced levels, 0 and 1 among them (Xu et al. 2018; Guo et al. 2018).

    Rounding has the gradient zero, so a plain white-box attack does not move. The adaptive attacker keeps the rounded
    values and passes the gradient straight through (BPDA with the identity).

    Options:
        bits: 1 to 16; Guo et al. use 3, Xu et al. 1 to 5.
    """

    name: ClassVar[str] = "bit_depth"
    paradigm: ClassVar[Paradigm] = "training-free"
    summary: ClassVar[str] = "few levels per colour channel"
    citation: ClassVar[str] = "Xu et al. 2018; Guo et al. 2018"
    neutral: ClassVar[dict[str, Any] | None] = {"bits": 16}
    recipe: ClassVar[Recipe] = Recipe("BPDA: the rounded values, the gradient of the identity")
    bits: int = 3

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 16:
            raise UserError(f"bit_depth: bits={self.bits} must be 1 to 16.")

    def wrap(self, model: Pipeline) -> Pipeline:
        """Rounds, then predicts."""
        return TransformedInput(model, lambda images, rng: self.quantize(images))

    def surrogate(self, model: Pipeline) -> Pipeline:
        """The rounded values, with the gradient of the identity."""
        transform = bpda(self.quantize)
        return TransformedInput(model, lambda images, rng: transform(images))

    def quantize(self, images: Tensor) -> Tensor:
        """Rounds (B, 3, H, W) in [0, 1] to the nearest levels."""
        steps = float(2**self.bits - 1)
        return (images * steps).round() / steps
