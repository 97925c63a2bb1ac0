"""SI-FGSM: the gradient is a mean over darker copies of the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from vlmdefend.attacks import ATTACKS
from vlmdefend.attacks.gradient._transfer import Transfer
from vlmdefend.errors import UserError


@ATTACKS.register
@dataclass(frozen=True, kw_only=True)
class Si(Transfer):
    """Scale-invariant attack (Lin et al. 2020, eq. 8): the mean gradient at x, x/2, x/4 ...; a gradient each.

    The paper's SI-NI-FGSM is ``si:plus=ni``. Options as of :class:`~._transfer.Transfer`, and:
        copies: how many, the image itself included.

    The last iterate counts.

    Raises:
        UserError: copies below 1.
    """

    name: ClassVar[str] = "si"
    summary: ClassVar[str] = "mean gradient over darker copies of the image, for transfer"
    citation: ClassVar[str] = "Lin et al. 2020"
    queries_iterate: ClassVar[bool] = False
    quick: ClassVar[dict[str, Any]] = {"copies": 2}
    copies: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.copies < 1:
            raise UserError(f"si: copies={self.copies} must be at least 1.")

    def scales(self) -> tuple[float, ...]:
        """Returns 1, 1/2, 1/4 ..."""
        return tuple(0.5**copy for copy in range(self.copies))
