"""Shrinks an image into the middle of a frame: padding for a model that takes one size only."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmdefend.defenses.views.resample import Span, axis_weights, resample, whole


def framed(images: Tensor, frame: Tensor, border: float) -> Tensor:
    """Returns image and border together at the image's size.

    Args:
        images: (..., 3, H, W).
        frame: what broadcasts to that; its middle is not seen.
        border: width on each side before shrinking, as a share of the image's side; 0 leaves the image as it is.
    """
    inside, axes = torch.ones(1, device=images.device), []
    for size in images.shape[-2:]:
        side = torch.tensor(round(size / (1 + 2 * border)), device=images.device).clamp_min(1)
        target = Span((size - side) // 2, side)
        place = torch.arange(size, device=images.device)
        inside = inside[..., None] * ((place >= target.first) & (place < target.first + side))
        axes.append(axis_weights(size, whole(size, side), target))
    return torch.where(inside[0] > 0, resample(images, *axes), frame)
