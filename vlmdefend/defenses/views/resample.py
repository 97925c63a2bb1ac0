"""Crops, enlarges, shrinks and places images, each differently, as two matrix products per image.

A product of matrices is differentiable, the same on every run of a GPU (the gradient of a gather is not), and takes
any number of boxes at once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Span(NamedTuple):
    """Pixels ``first`` to ``first + length - 1`` of one axis, for each of any number of images."""

    first: Tensor  # (...) whole numbers
    length: Tensor  # (...) at least 1


def axis_weights(size: int, source: Span, target: Span) -> Tensor:
    """Returns (..., size, size) weights that bring pixels of ``source`` to those of ``target``; zero elsewhere.

    Bilinear with half-pixel centres; shrinking filters first (the triangle is as wide as a new pixel). These are the
    weights of Pillow, and of ``F.interpolate`` with ``antialias=True``, on the cropped image.
    """
    place = torch.arange(size, device=source.first.device)
    first, length, start, extent = (t[..., None, None].float() for t in (*source, *target))
    scale = length / extent
    centre = first + (place[:, None] - start + 0.5) * scale - 0.5
    weights = (1 - (place - centre).abs() / scale.clamp_min(1.0)).clamp_min(0.0)
    weights = weights * ((place >= first) & (place < first + length))
    weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(1e-12)
    return weights * ((place[:, None] >= start) & (place[:, None] < start + extent))


def whole(size: int, like: Tensor) -> Span:
    """Returns spans of the whole axis, as many as ``like`` has elements."""
    return Span(torch.zeros_like(like), torch.full_like(like, size))


def resample(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Resamples (..., C, H, W) images with (..., H, H) and (..., W, W) weights; leading axes broadcast."""
    rows, columns = (weights[..., None, :, :].to(images.dtype) for weights in (rows, columns))
    resampled: Tensor = rows @ images @ columns.mT
    return resampled
