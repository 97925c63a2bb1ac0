"""Geometry of patches: positions, pasting, cutting out, resizing."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmdefend.rng import ImageRng

Place = Literal["random", "center", "corner"]


def corners(place: Place, side: int, images: Tensor, rng: ImageRng) -> Tensor:
    """Returns (B, 2) int64 top and left of a square of ``side`` pixels: random, centred, or at the lower right."""
    space = torch.tensor(images.shape[2:], device=images.device) - side
    if place == "random":
        at = (rng.uniform((2,)).to(images.device) * (space + 1)).long()
        return at.minimum(space)
    return (space // 2 if place == "center" else space).expand(len(images), 2)


def window(at: Tensor, side: int, images: Tensor) -> Tensor:
    """Returns (B, 1, H, W) bool: True inside of each image's square."""
    rows, columns = (_offsets(at[:, axis], images.shape[2 + axis]) for axis in (0, 1))
    rows, columns = (rows >= 0) & (rows < side), (columns >= 0) & (columns < side)
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def paste(images: Tensor, patches: Tensor, at: Tensor) -> Tensor:
    """Returns (B, C, H, W) images with (C, S, S) or (B, C, S, S) patches pasted in; a new tensor."""
    side = patches.shape[-1]
    patches = patches.expand(len(images), *patches.shape[-3:])
    rows, columns = (_offsets(at[:, axis], images.shape[2 + axis]).clamp(0, side - 1) for axis in (0, 1))
    shape = (*images.shape[:2], -1, -1)
    spread = patches.gather(2, rows[:, None, :, None].expand(*shape[:2], -1, side))
    spread = spread.gather(3, columns[:, None, None, :].expand(*shape[:2], images.shape[2], -1))
    return torch.where(window(at, side, images), spread, images)


def cut(images: Tensor, at: Tensor, side: int) -> Tensor:
    """Returns the (B, C, side, side) content of the squares."""
    along = torch.arange(side, device=images.device)
    rows, columns = at[:, :1] + along, at[:, 1:] + along
    found = images.gather(2, rows[:, None, :, None].expand(*images.shape[:2], -1, images.shape[3]))
    return found.gather(3, columns[:, None, None, :].expand(*images.shape[:2], side, -1))


def resized(patch: Tensor, side: int) -> Tensor:
    """Resizes a (C, S, S) patch to (C, side, side)."""
    if patch.shape[-1] == side:
        return patch
    return F.interpolate(patch[None], (side, side), mode="bilinear", antialias=True)[0].clamp_(0.0, 1.0)


def _offsets(first: Tensor, size: int) -> Tensor:
    return torch.arange(size, device=first.device) - first[:, None]
