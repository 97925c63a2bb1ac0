"""The label-free attack on image features that FARE is trained against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from vlmdefend.attacks import ATTACKS
from vlmdefend.attacks.gradient._label_free import LabelFree


@ATTACKS.register
@dataclass(frozen=True, kw_only=True)
class Feature(LabelFree):
    """Move the image features away from the clean ones (FARE, Schlarmann et al. 2024, eq. 3); no label, no text.

    Options as of :class:`~vlmdefend.attacks.gradient._label_free.LabelFree`, and:
        distance: ``l2`` is squared and of unnormalised features, as in the paper; ``cos`` is 1 - cosine.
    """

    name: ClassVar[str] = "feature"
    summary: ClassVar[str] = "moves the image features; needs no label"
    citation: ClassVar[str] = "Schlarmann et al. 2024"
    distance: Literal["l2", "cos"] = "l2"

    @property
    def loss_name(self) -> str:
        """The name of the loss, by the option ``distance``."""
        return "feature" if self.distance == "l2" else "feature_cos"
