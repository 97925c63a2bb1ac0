"""The label-free attack on similarities that AdvPT prepares its images with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vlmdefend.attacks import ATTACKS
from vlmdefend.attacks.gradient._label_free import LabelFree


@ATTACKS.register
@dataclass(frozen=True, kw_only=True)
class FeatureKl(LabelFree):
    """Move the softmax over image-text similarities, KL(clean || adversarial) (AdvPT, Zhang et al. 2024); no label.

    Options as of :class:`~vlmdefend.attacks.gradient._label_free.LabelFree`.
    """

    name: ClassVar[str] = "feature-kl"
    summary: ClassVar[str] = "moves the softmax of image-text similarities; needs no label"
    citation: ClassVar[str] = "Zhang et al. 2024"

    @property
    def loss_name(self) -> str:
        """The name of the loss: KL from the clean prediction."""
        return "kl"
