"""Four blurs of the common corruptions (Hendrycks & Dietterich 2019): defocus, glass, motion, zoom."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmdefend.attacks.corruptions._filters import blurred, filtered, motion_blurred, zoomed
from vlmdefend.rng import ImageRng


def defocus_blur(images: Tensor, rng: ImageRng, radius: float, alias: float) -> Tensor:
    """Correlation with a disk, whose edge is softened by a Gaussian of sigma ``alias``."""
    return filtered(images, disk(radius, alias))


def disk(radius: float, alias: float) -> Tensor:
    """Returns a (k, k) disk kernel, k = 17 or, above a radius of 8, 2 radius + 1.

    It sums to 1, but for a radius above 8 to 1.01: as published, what lies beyond the kernel is its reflection.
    """
    reach = max(int(radius), 8)
    along = torch.arange(-reach, reach + 1).double()
    kernel = (along[:, None] ** 2 + along**2 <= radius**2).double()
    soft = torch.exp(-0.5 * (torch.arange(-1, 2) if radius <= 8 else torch.arange(-2, 3)).double() ** 2 / alias**2)
    soft = soft / soft.sum()
    return filtered((kernel / kernel.sum())[None, None], soft[:, None] * soft)[0, 0]


def glass_blur(images: Tensor, rng: ImageRng, sigma: float, reach: float, times: float) -> Tensor:
    """Blur, move pixels by up to ``reach``, ``times`` over, and blur again."""
    images = blurred(images, sigma)
    height, width = images.shape[2:]
    for _ in range(int(times)):
        by = rng.integers((2, height, width), -int(reach), int(reach)).to(images.device)
        source = sources(by[:, 0], by[:, 1], int(reach))
        images = images.flatten(2).gather(2, source[:, None].expand(-1, images.shape[1], -1)).view_as(images)
    return blurred(images, sigma)


def sources(down: Tensor, right: Tensor, reach: int) -> Tensor:
    """(B, H W) where each pixel's value comes from, as the published loop over the pixels moves them.

    The loop runs from the last pixel to the first and means to swap each with the one ``down`` and ``right`` of it
    (B, H, W), but its swap of array views copies: a pixel takes the other's value, which may itself have been
    overwritten before. Chains of copies are followed here for all pixels at once, by doubling.
    """
    count, height, width = down.shape
    device = down.device
    rows, columns = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)
    moves = (rows > reach) & (rows <= height - reach) & (columns > reach) & (columns <= width - reach)
    moves, here = moves.flatten(), torch.arange(height * width, device=device)
    target = ((rows + down).clamp(0, height - 1) * width + (columns + right).clamp(0, width - 1)).flatten(1)
    chained = moves[target] & (target > here)  # overwritten before this pixel reads it
    total = height * width
    pointer = torch.where(chained, target, target + total).where(moves, here + total)  # + total: the value as it was
    pointer = torch.cat([pointer, (here + total).expand(count, -1)], dim=1)
    while True:
        further = pointer.gather(1, pointer)
        if torch.equal(further, pointer):
            return pointer[:, :total] - total
        pointer = further


def motion_blur(images: Tensor, rng: ImageRng, radius: float, sigma: float) -> Tensor:
    """A trail in a direction between -45 and 45 degrees."""
    return motion_blurred(images, radius, sigma, rng.uniform((1,), -45.0, 45.0)[:, 0])


def zoom_blur(images: Tensor, rng: ImageRng, largest: float, step: float) -> Tensor:
    """The mean of the image and of itself enlarged by 1, 1 + step ... ``largest``."""
    count = round((largest - 1) / step) + 1
    total = images.clone()
    for i in range(count):
        total += zoomed(images, 1 + i * step)
    return total / (count + 1)
