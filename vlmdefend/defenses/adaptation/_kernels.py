"""Gaussian kernels of several widths, and the maximum mean discrepancy of two samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlmdefend.errors import UserError

WIDTHS = (0.125, 0.25, 0.5, 1.0, 2.0)


def kernels(points: Tensor, widths: Sequence[float] = WIDTHS, fixed: float | None = None) -> Tensor:
    """Returns the (N, N) sum over ``widths`` w of exp(-d^2 / (2 w s^2)); s^2 is the mean squared distance, or
    ``fixed``.
    """
    distances = (points[:, None, :] - points[None, :, :]).square().sum(dim=2)
    scale = distances.detach().mean() if fixed is None else distances.new_tensor(fixed)
    scale = scale.clamp_min(1e-12)
    return torch.stack([torch.exp(-distances / (2.0 * width * scale)) for width in widths]).sum(dim=0)


def mean_discrepancy(kernel: Tensor, source: int) -> Tensor:
    """Returns the unbiased squared maximum mean discrepancy (Gretton et al. 2012, eq. 3); may be below zero.

    Args:
        kernel: (N, N) of the points of both samples.
        source: how many of them, the first, are of the first sample.

    Raises:
        UserError: fewer than two images of a domain in the batch.
    """
    target = len(kernel) - source
    if source < 2 or target < 2:
        raise UserError("dan and jan compare two images of each domain at least; give a larger --batch-size.")
    own, other, between = kernel[:source, :source], kernel[source:, source:], kernel[:source, source:]
    within = (own.sum() - own.trace()) / (source * (source - 1)) + (other.sum() - other.trace()) / (
        target * (target - 1)
    )
    return within - 2.0 * between.mean()
