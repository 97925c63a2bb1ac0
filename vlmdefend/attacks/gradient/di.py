"""DI-FGSM: the gradient is taken at the image shrunk to a random size and padded at a random place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmdefend.attacks import ATTACKS
from vlmdefend.attacks.gradient._transfer import Transfer
from vlmdefend.errors import UserError


@ATTACKS.register
@dataclass(frozen=True, kw_only=True)
class Di(Transfer):
    """Diverse inputs (Xie et al. 2019, section 3.3): with some probability shrink, then pad with zeros to the old size.

    The paper pads beyond the old size, which zero-shot models with a fixed input would undo. Each image draws at each
    step for itself. With the momentum (default) this is the paper's M-DI²-FGSM, with ``decay=0`` its DI²-FGSM. Options
    as of :class:`~vlmdefend.attacks.gradient._transfer.Transfer`, and:
        probability: of showing a changed image.
        smallest: the smallest size, as a share of the image's.

    The last iterate counts.

    Raises:
        UserError: an option out of range; images that are not (B, C, H, W), when it attacks.
    """

    name: ClassVar[str] = "di"
    summary: ClassVar[str] = "gradient of the image at a random size and place, for transfer"
    citation: ClassVar[str] = "Xie et al. 2019"
    queries_iterate: ClassVar[bool] = False
    numbers: ClassVar[int] = 4
    probability: float = 0.5
    smallest: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.probability <= 1 or not 0 < self.smallest <= 1:
            raise UserError(
                f"di: probability={self.probability} must lie in [0, 1] and smallest={self.smallest} in (0, 1]."
            )

    def vary(self, images: Tensor, draws: Tensor) -> Tensor:
        """Resizes and pads (B, C, H, W) images; the draws decide which images, their size, and their place."""
        if images.dim() != 4:
            raise UserError(f"attack di needs images (B, C, H, W), it was given {tuple(images.shape)}.")
        rows = placement(images.shape[-2], self.smallest, draws[:, 1], draws[:, 2])
        columns = placement(images.shape[-1], self.smallest, draws[:, 1], draws[:, 3])
        changed = rows[:, None] @ images @ columns[:, None].mT
        return torch.where((draws[:, 0] < self.probability)[:, None, None, None], changed, images)


def placement(length: int, smallest: float, size: Tensor, place: Tensor) -> Tensor:
    """Returns (B, length, length) matrices that resize an axis bilinearly to a smaller size and pad it with zeros.

    A product with it costs more than a gather, but its gradient is the same to the bit at every run, on a GPU too.

    Args:
        size: (B,) in [0, 1), which of the sizes from ``smallest * length`` to ``length``.
        place: (B,) in [0, 1), which of the free places.
    """
    least = max(int(length * smallest), 1)
    sizes = least + (size * (length + 1 - least)).floor()  # (B,)
    before = (place * (length + 1 - sizes)).floor()
    pixels = torch.arange(length, device=size.device)
    inside = pixels - before[:, None]  # (B, length) the pixel's place in the small image
    source = ((inside + 0.5) * (length / sizes)[:, None] - 0.5).clamp(0, length - 1)
    weights = (1.0 - (source[:, :, None] - pixels).abs()).clamp_min(0.0)
    return weights * ((inside >= 0) & (inside < sizes[:, None]))[:, :, None]
