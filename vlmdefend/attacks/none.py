"""No attack: the clean accuracy of the deployed pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlmdefend.attacks import ATTACKS
from vlmdefend.attacks.base import Attack
from vlmdefend.attacks.view import View
from vlmdefend.rng import ImageRng
from vlmdefend.types import NORMS, Norm, Threat


@ATTACKS.register
@dataclass(frozen=True, kw_only=True)
class NoAttack(Attack):
    """Returns the images as they are."""

    name: ClassVar[str] = "none"
    summary: ClassVar[str] = "no attack: clean accuracy"
    citation: ClassVar[str] = "–"
    norms: ClassVar[tuple[Norm, ...]] = NORMS
    gradient_free: ClassVar[bool] = True

    @property
    def blind(self) -> bool:
        """True: it makes no query."""
        return True

    def perturb(self, view: View, images: Tensor, labels: Tensor, threat: Threat, rng: ImageRng) -> Tensor:
        """Returns the images."""
        return images
