"""Building blocks of the corruptions: borders, Gaussian blurs as matrices, shifts and zooms, for a whole batch."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Border = Literal["edge", "mirror", "reflect"]  # aaa|abcd|ddd, cba|abcd|dcb, dcb|abcd|cba


def inside(index: Tensor, size: int, border: Border) -> Tensor:
    """Maps any whole numbers to pixel indices 0..size-1, by the rule of the image's border."""
    if border == "edge":
        return index.clamp(0, size - 1)
    period = 2 * size if border == "mirror" else max(2 * size - 2, 1)
    index = index.remainder(period)
    return torch.where(index < size, index, period - index - int(border == "mirror"))


def gaussian_matrix(size: int, sigma: float, truncate: float, border: Border) -> Tensor:
    """Returns the (size, size) blur of one axis, with the weights of ``scipy.ndimage.gaussian_filter1d``."""
    if sigma == 0:
        return torch.eye(size)
    radius = int(truncate * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1)
    weights = torch.exp(-0.5 * (offsets.double() / sigma) ** 2)
    weights = (weights / weights.sum()).expand(size, -1)
    places = inside(torch.arange(size)[:, None] + offsets, size, border)
    return torch.zeros(size, size, dtype=torch.float64).scatter_add_(1, places, weights).float()


def blurred(images: Tensor, sigma: float, truncate: float = 4.0, border: Border = "edge") -> Tensor:
    """Applies a Gaussian blur to (B, C, H, W); a matrix per axis, so that a blur wider than the image costs no more."""
    rows, columns = (gaussian_matrix(size, sigma, truncate, border).to(images) for size in images.shape[2:])
    return rows @ images @ columns.T


def filtered(images: Tensor, kernel: Tensor) -> Tensor:
    """Correlates (B, C, H, W) with a (k, k) kernel, k odd; reflected at the border."""
    reach = kernel.shape[0] // 2
    rows, columns = (
        inside(torch.arange(-reach, size + reach), size, "reflect").to(images.device) for size in images.shape[2:]
    )
    padded = images[:, :, rows][..., columns]
    found = F.conv2d(padded.flatten(0, 1)[:, None], kernel.to(images)[None, None])
    return found.view_as(images)


def shifted(images: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """(B, C, H, W) the pixel ``down`` rows below and ``right`` columns beside each, (B,) numbers; edges repeated."""
    places = []
    for size, by in zip(images.shape[2:], (down, right), strict=True):
        places.append(inside(torch.arange(size, device=images.device) + by.to(images.device)[:, None], size, "edge"))
    rows = places[0][:, None, :, None].expand(images.shape)
    return images.gather(2, rows).gather(3, places[1][:, None, None, :].expand(images.shape))


def motion_blurred(images: Tensor, radius: float, sigma: float, degrees: Tensor) -> Tensor:
    """(B, C, H, W) one-sided Gaussian trail of 2 radius + 1 pixels, as ImageMagick's; (B,) ``degrees``, 0 = right."""
    width = 2 * math.ceil(radius) + 1
    weights = torch.exp(-0.5 * (torch.arange(width).double() / sigma) ** 2)
    weights /= weights.sum()
    angle = degrees.double() * (math.pi / 180)
    result = torch.zeros_like(images)
    for distance, weight in enumerate(weights.tolist()):
        right, down = ((distance * along - 0.5).ceil().long() for along in (angle.cos(), angle.sin()))
        result.add_(shifted(images, down, right), alpha=weight)
    return result


def zoomed(images: Tensor, factor: float) -> Tensor:
    """Crops the centre of (B, C, H, W), enlarged linearly to the size of the image."""
    height, width = images.shape[2:]
    rows, columns = math.ceil(height / factor), math.ceil(width / factor)
    top, left = (height - rows) // 2, (width - columns) // 2
    centre = images[:, :, top : top + rows, left : left + columns]
    size = [round(rows * factor), round(columns * factor)]
    large = F.interpolate(centre, size, mode="bilinear", align_corners=True)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return large[:, :, top : top + height, left : left + width]


def box_matrix(source: int, target: int) -> Tensor:
    """Returns the (target, source) resize of one axis to whole pixels, each counted or not, as PIL's ``BOX``."""
    scale = source / target
    support = 0.5 * max(scale, 1.0)
    matrix = torch.zeros(target, source)
    for row in range(target):
        centre = (row + 0.5) * scale
        first, last = max(int(centre - support + 0.5), 0), min(int(centre + support + 0.5), source)
        offset = (torch.arange(first, last).double() - centre + 0.5) / max(scale, 1.0)
        weights = ((offset > -0.5) & (offset <= 0.5)).float()
        matrix[row, first:last] = weights / weights.sum()
    return matrix
