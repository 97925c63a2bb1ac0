"""Weak and strong image augmentations for consistency losses, drawn from each image's own random stream."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmdefend.rng import ImageRng


def weakly(images: Tensor, rng: ImageRng) -> Tensor:
    """Shifts (B, 3, H, W) images by up to a tenth of the side, repeating the border. No flip: digits have sides."""
    moves = rng.uniform((2,), -0.2, 0.2)  # of the half side
    return _affine(images, torch.ones(len(rng)), torch.zeros(len(rng)), moves)


def strongly(images: Tensor, rng: ImageRng) -> Tensor:
    """Rotates by up to 20 degrees, scales by 0.8 to 1.2, shifts, changes contrast and brightness, cuts out a square."""
    draws = rng.uniform((7,), -1.0, 1.0)
    moved = _affine(images, 1.0 + 0.2 * draws[:, 0], 0.35 * draws[:, 1], 0.25 * draws[:, 2:4])
    device = images.device
    contrast = (1.0 + 0.4 * draws[:, 4]).to(device).view(-1, 1, 1, 1)
    brightness = (0.2 * draws[:, 5]).to(device).view(-1, 1, 1, 1)
    mean = moved.mean(dim=(1, 2, 3), keepdim=True)
    return cut_out((contrast * (moved - mean) + mean + brightness).clamp(0.0, 1.0), rng)


def cut_out(images: Tensor, rng: ImageRng, share: float = 0.25) -> Tensor:
    """Turns a random square of side ``share`` of the image's side grey (DeVries & Taylor 2017)."""
    height, width = images.shape[-2:]
    side = max(1, round(share * min(height, width)))
    place = rng.uniform((2,))
    top = (place[:, 0] * (height - side + 1)).long().view(-1, 1, 1)
    left = (place[:, 1] * (width - side + 1)).long().view(-1, 1, 1)
    rows, columns = torch.arange(height).view(1, -1, 1), torch.arange(width).view(1, 1, -1)
    inside = (rows >= top) & (rows < top + side) & (columns >= left) & (columns < left + side)
    return images.masked_fill(inside[:, None].to(images.device), 0.5)


def masked(images: Tensor, rng: ImageRng, patches: int = 4, share: float = 0.25) -> Tensor:
    """Blackens randomly chosen cells of a ``patches`` x ``patches`` grid."""
    order = rng.uniform((patches**2,)).argsort(dim=1).argsort(dim=1)
    hidden = (order < round(share * patches**2)).view(-1, 1, patches, patches)
    mask = F.interpolate(hidden.float(), images.shape[-2:], mode="nearest").bool()
    return images.masked_fill(mask.to(images.device), 0.0)


def cropped(images: Tensor, rng: ImageRng, *, flip: bool) -> Tensor:
    """Resizes a crop of 0.3 to 1 of the side to the full size; ``flip``: mirrored half the time."""
    draws = rng.uniform((4,))
    scale = 0.3 + 0.7 * draws[:, 0]
    moves = (2.0 * draws[:, 1:3] - 1.0) * (1.0 - scale)[:, None]
    mirror = torch.where(draws[:, 3] < 0.5, -1.0, 1.0) if flip else torch.ones(len(rng))
    return _affine(images, scale, torch.zeros(len(rng)), moves, mirror)


def _affine(images: Tensor, scale: Tensor, angle: Tensor, moves: Tensor, mirror: Tensor | None = None) -> Tensor:
    """(B,) scale and angle in radians, (B, 2) moves in half sides: bilinear, the border repeated."""
    cos, sin = scale * angle.cos(), scale * angle.sin()
    mirror = torch.ones_like(cos) if mirror is None else mirror
    first = torch.stack([mirror * cos, -sin, moves[:, 0]], dim=1)
    second = torch.stack([mirror * sin, cos, moves[:, 1]], dim=1)
    matrices = torch.stack([first, second], dim=1).to(images.device)
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False).clamp(0.0, 1.0)
