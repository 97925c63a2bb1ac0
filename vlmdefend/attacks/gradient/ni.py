"""NI-FGSM: the gradient is taken one momentum step ahead of the iterate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlmdefend.attacks import ATTACKS
from vlmdefend.attacks.gradient._transfer import Transfer
from vlmdefend.kernels.operators import Scale
from vlmdefend.types import per_image


@ATTACKS.register
@dataclass(frozen=True, kw_only=True)
class Ni(Transfer):
    """Nesterov iterative FGSM (Lin et al. 2020, eq. 6 and 7): the gradient at ``x + decay alpha m``.

    That point is clamped to [0, 1], where pipelines are defined. Options as of
    :class:`~vlmdefend.attacks.gradient._transfer.Transfer`; the last iterate counts.
    """

    name: ClassVar[str] = "ni"
    summary: ClassVar[str] = "Nesterov look-ahead along the momentum, for transfer"
    citation: ClassVar[str] = "Lin et al. 2020"
    queries_iterate: ClassVar[bool] = False

    def ahead(self, images: Tensor, momentum: Tensor, length: Scale) -> Tensor:
        """Returns ``clamp01(x + length m)``."""
        factor = per_image(length, momentum) if isinstance(length, Tensor) else length
        return (images + factor * momentum).clamp_(0.0, 1.0)
