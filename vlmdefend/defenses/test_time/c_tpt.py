"""C-TPT: test-time prompt tuning that keeps class features dispersed, for calibration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlmdefend.defenses import DEFENSES
from vlmdefend.defenses.test_time.tpt import Tpt
from vlmdefend.defenses.views.crops import marginal_entropy
from vlmdefend.errors import UserError


@DEFENSES.register
@dataclass(frozen=True, kw_only=True)
class CTpt(Tpt):
    """TPT's loss minus ``dispersion`` times the mean distance of the class features to their mean (Yoon et al. 2024).

    Unit features, L2 distance, as the official code. It changes confidence more than predictions; with one step of
    AdamW the gradient's sign is all that counts, which at 50 the dispersion, the same for every image, mostly decides.

    Options:
        dispersion: lambda, 50 for fine-grained sets in the paper, 20 for shifted ImageNets.
    """

    name: ClassVar[str] = "c_tpt"
    summary: ClassVar[str] = "TPT that keeps the class features apart"
    citation: ClassVar[str] = "Yoon et al., ICLR 2024"
    dispersion: float = 50.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dispersion < 0:
            raise UserError(f"c_tpt: dispersion={self.dispersion} must be zero or more.")

    def loss(self, logits: Tensor, classes: Tensor) -> Tensor:
        """Returns the entropy of the mean probabilities minus the spread of the class features."""
        return marginal_entropy(logits) - self.dispersion * spread(classes)


def spread(classes: Tensor) -> Tensor:
    """Returns (B,) the mean distance of (B, C, D) class features to their mean."""
    distances: Tensor = (classes - classes.mean(dim=1, keepdim=True)).norm(dim=-1)
    return distances.mean(dim=1)
