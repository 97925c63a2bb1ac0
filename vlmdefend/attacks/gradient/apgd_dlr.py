"""Auto-PGD on the difference of logits ratio."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vlmdefend.attacks import ATTACKS
from vlmdefend.attacks.gradient.apgd_ce import ApgdCe


@ATTACKS.register
@dataclass(frozen=True, kw_only=True)
class ApgdDlr(ApgdCe):
    """Auto-PGD raising the difference of logits ratio, which no logit scale can flatten (Croce & Hein 2020, section 4).

    Options as of :class:`~vlmdefend.attacks.gradient.apgd_ce.ApgdCe`.

    Raises:
        UserError: as there; a model of fewer than 3 classes, when it attacks.
    """

    name: ClassVar[str] = "apgd-dlr"
    summary: ClassVar[str] = "Auto-PGD on the difference of logits ratio, 100 steps"
    loss: ClassVar[str] = "dlr"
