"""TI-FGSM: the gradient is smoothed, as if averaged over shifted copies of the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmdefend.attacks import ATTACKS
from vlmdefend.attacks.gradient._transfer import Transfer
from vlmdefend.errors import UserError


@ATTACKS.register
@dataclass(frozen=True, kw_only=True)
class Ti(Transfer):
    """Translation-invariant attack (Dong et al. 2019, eq. 8): the gradient, convolved with a Gaussian.

    Options as of :class:`~vlmdefend.attacks.gradient._transfer.Transfer`, and:
        kernel: its side in pixels, odd; the paper's 15 is for images of side 299.
        radius: how many standard deviations reach from its centre to its edge.

    The best iterate counts: the gradient is that of the iterate.

    Raises:
        UserError: an even kernel or a radius that is not positive; images that are not (B, C, H, W), when it attacks.
    """

    name: ClassVar[str] = "ti"
    summary: ClassVar[str] = "gradient smoothed by a Gaussian (shifted copies), for transfer"
    citation: ClassVar[str] = "Dong et al. 2019"
    kernel: int = 15
    radius: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel < 1 or self.kernel % 2 == 0 or self.radius <= 0:
            raise UserError(f"ti: kernel={self.kernel} must be odd and positive, radius={self.radius} positive.")

    def smooth(self, gradient: Tensor) -> Tensor:
        """Convolves (B, C, H, W) with a separable Gaussian, columns then rows; zeros beyond the edges."""
        if gradient.dim() != 4:
            raise UserError(f"attack ti needs images (B, C, H, W), it was given {tuple(gradient.shape)}.")
        weights = gaussian(self.kernel, self.radius).to(gradient)
        planes = gradient.flatten(0, 1)[:, None]  # (B C, 1, H, W)
        columns = F.conv2d(planes, weights[None, None, :, None], padding=(self.kernel // 2, 0))
        return F.conv2d(columns, weights[None, None, None], padding=(0, self.kernel // 2)).view_as(gradient)


def gaussian(side: int, radius: float) -> Tensor:
    """Returns (side,) float64 weights of a normal density out to ``radius`` standard deviations, of sum 1."""
    weights = torch.linspace(-radius, radius, side, dtype=torch.float64).square().mul(-0.5).exp()
    return weights / weights.sum()
