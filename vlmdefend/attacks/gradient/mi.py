"""MI-FGSM: iterated sign steps along a momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vlmdefend.attacks import ATTACKS
from vlmdefend.attacks.gradient._transfer import Transfer


@ATTACKS.register
@dataclass(frozen=True, kw_only=True)
class Mi(Transfer):
    """Momentum iterative FGSM (Dong et al. 2018, algorithm 1; L2: section 3.3): ``m <- decay m + g / mean|g|``.

    The family's common part and nothing else; every transfer attack has this momentum. Options as of
    :class:`~vlmdefend.attacks.gradient._transfer.Transfer`; best iterate per image.
    """

    name: ClassVar[str] = "mi"
    summary: ClassVar[str] = "momentum iterative FGSM, for transfer"
    citation: ClassVar[str] = "Dong et al. 2018"
