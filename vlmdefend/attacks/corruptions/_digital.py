"""The 15 common corruptions (Hendrycks & Dietterich 2019, section 4): their parameters, noise and digital ones.

The parameters are those of the published code: of its ImageNet-C script, written for 224 pixels, for images whose
shorter side exceeds 64 pixels, and of its CIFAR-10-C script, written for 32, for smaller ones. They count in pixels and
are not scaled to other sizes, except for ``elastic_transform`` of small images, whose script scales with the side.
Pixels stay float32 where the scripts round to 8 bits, except for ``jpeg_compression``.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vlmdefend.attacks.corruptions._blur import defocus_blur, glass_blur, motion_blur, zoom_blur
from vlmdefend.attacks.corruptions._filters import blurred, box_matrix
from vlmdefend.attacks.corruptions._weather import fog, frost, snow
from vlmdefend.rng import ImageRng

SMALL = 64  # pixels of the shorter side up to which the CIFAR-10-C parameters hold
UNIT = 244.0  # pixels; the published elastic transform of 224-pixel images is written in it


def gaussian_noise(images: Tensor, rng: ImageRng, std: float) -> Tensor:
    """Adds normal noise."""
    return images + std * rng.normal(images.shape[1:]).to(images.device)


def shot_noise(images: Tensor, rng: ImageRng, photons: float) -> Tensor:
    """Replaces each value by a Poisson count whose mean is ``photons`` at white."""
    seeds = rng.integers((1,), 0, 2**62)[:, 0].tolist()
    rates = (images * photons).cpu()
    counts = [torch.poisson(r, torch.Generator().manual_seed(s)) for r, s in zip(rates, seeds, strict=True)]
    return torch.stack(counts).to(images.device) / photons


def impulse_noise(images: Tensor, rng: ImageRng, share: float) -> Tensor:
    """Sets a share of the values to 0 or 1 (salt and pepper)."""
    hit, salt = (rng.uniform(images.shape[1:]).to(images.device) for _ in range(2))
    return torch.where(hit < share, (salt < 0.5).to(images), images)


def brightness(images: Tensor, rng: ImageRng, more: float) -> Tensor:
    """Raises the value channel of HSV; hue and saturation stay."""
    value = images.amax(dim=1, keepdim=True)
    brighter = (value + more).clamp(max=1.0)
    return torch.where(value > 0, images * (brighter / value.clamp_min(1e-12)), brighter)


def contrast(images: Tensor, rng: ImageRng, share: float) -> Tensor:
    """Moves pixels towards the mean of each channel."""
    mean = images.mean(dim=(2, 3), keepdim=True)
    return (images - mean) * share + mean


def elastic_transform(images: Tensor, rng: ImageRng, stretch: float, sigma: float, corners: float) -> Tensor:
    """An affine map of three points moved by up to ``corners``, then a smooth random field; units of :data:`UNIT`.

    Simard et al. 2003. Small images: units of the shorter side.
    """
    height, width = images.shape[2:]
    side = min(height, width)
    unit = float(side) if side <= SMALL else UNIT
    third = max(side // 3, 1)
    centre = torch.tensor([width // 2, height // 2])
    points = centre + third * torch.tensor([[1, 1], [1, -1], [-1, -1]])  # (3, 2) x, y
    moved = points + rng.uniform((3, 2), -corners * unit, corners * unit)
    ones = torch.ones(len(images), 3, 1)
    back = torch.linalg.solve(torch.cat([moved, ones], dim=2), points.float().expand_as(moved))  # (B, 3, 2)
    y, x = torch.meshgrid(torch.arange(height).float(), torch.arange(width).float(), indexing="ij")
    grid = torch.stack([x, y], dim=-1)  # (H, W, 2)
    affine = (torch.cat([grid, torch.ones(height, width, 1)], dim=2).flatten(0, 1) @ back).view(-1, height, width, 2)
    scale = torch.tensor([max(width - 1, 1), max(height - 1, 1)])
    images = _sampled(images, affine * 2 / scale - 1, corners=True)
    field = rng.uniform((2, height, width), -1.0, 1.0)
    field = stretch * unit * blurred(field, sigma * unit, truncate=3.0, border="mirror")
    bent = grid + field.permute(0, 2, 3, 1)
    return _sampled(images, (2 * bent + 1) / torch.tensor([width, height]) - 1, corners=False)


def _sampled(images: Tensor, grid: Tensor, *, corners: bool) -> Tensor:
    return F.grid_sample(images, grid.to(images), "bilinear", "reflection", align_corners=corners)


def pixelate(images: Tensor, rng: ImageRng, share: float) -> Tensor:
    """Shrinks the image to a share of its size and enlarges it again, in whole pixels."""
    for axis in (2, 3):
        size = images.shape[axis]
        few = max(int(size * share), 1)
        both = (box_matrix(few, size) @ box_matrix(size, few)).to(images)
        images = both @ images if axis == 2 else images @ both.T
    return images


def jpeg_compression(images: Tensor, rng: ImageRng, quality: float) -> Tensor:
    """Encodes the image as JPEG and decodes it."""
    found = []
    for pixels in (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy():
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=int(quality))
        found.append(torch.from_numpy(np.array(Image.open(file))))
    return torch.stack(found).permute(0, 3, 1, 2).to(images) / 255


Severities = tuple[tuple[float, ...], ...]  # what each of the 5 severities passes on
CORRUPTIONS: dict[str, Callable[..., Tensor]] = {
    function.__name__: function
    for function in (
        gaussian_noise,
        shot_noise,
        impulse_noise,
        defocus_blur,
        glass_blur,
        motion_blur,
        zoom_blur,
        snow,
        frost,
        fog,
        brightness,
        contrast,
        elastic_transform,
        pixelate,
        jpeg_compression,
    )
}
LARGE_IMAGES: dict[str, Severities] = {
    "gaussian_noise": ((0.08,), (0.12,), (0.18,), (0.26,), (0.38,)),
    "shot_noise": ((60,), (25,), (12,), (5,), (3,)),
    "impulse_noise": ((0.03,), (0.06,), (0.09,), (0.17,), (0.27,)),
    "defocus_blur": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    "glass_blur": ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    "motion_blur": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    "zoom_blur": ((1.11, 0.01), (1.15, 0.01), (1.20, 0.02), (1.24, 0.02), (1.30, 0.03)),
    "snow": (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    ),
    "frost": ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
    "fog": ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    "brightness": ((0.1,), (0.2,), (0.3,), (0.4,), (0.5,)),
    "contrast": ((0.4,), (0.3,), (0.2,), (0.1,), (0.05,)),
    "elastic_transform": ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02)),
    "pixelate": ((0.6,), (0.5,), (0.4,), (0.3,), (0.25,)),
    "jpeg_compression": ((25,), (18,), (15,), (10,), (7,)),
}
SMALL_IMAGES: dict[str, Severities] = {
    "gaussian_noise": ((0.04,), (0.06,), (0.08,), (0.09,), (0.10,)),
    "shot_noise": ((500,), (250,), (100,), (75,), (50,)),
    "impulse_noise": ((0.01,), (0.02,), (0.03,), (0.05,), (0.07,)),
    "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    "glass_blur": ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    "motion_blur": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    "zoom_blur": ((1.06, 0.01), (1.11, 0.01), (1.15, 0.01), (1.20, 0.01), (1.25, 0.01)),
    "snow": (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    ),
    "frost": ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
    "fog": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    "brightness": ((0.05,), (0.1,), (0.15,), (0.2,), (0.3,)),
    "contrast": ((0.75,), (0.5,), (0.4,), (0.3,), (0.15,)),
    "elastic_transform": ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    "pixelate": ((0.95,), (0.9,), (0.85,), (0.75,), (0.65,)),
    "jpeg_compression": ((80,), (65,), (58,), (50,), (40,)),
}


def corrupt(kind: str, images: Tensor, severity: int, rng: ImageRng) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> the same, corrupted at a severity from 1 to 5; each image draws from its own stream."""
    table = SMALL_IMAGES if min(images.shape[2:]) <= SMALL else LARGE_IMAGES
    return CORRUPTIONS[kind](images, rng, *table[kind][severity - 1]).clamp(0.0, 1.0)
