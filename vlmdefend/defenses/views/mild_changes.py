"""Mild random changes of an image (shift, rotation, colour, blur, noise), drawn for each image separately."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmdefend.defenses.views.augmix import slide
from vlmdefend.defenses.views.resample import Span, axis_weights, resample, whole
from vlmdefend.rng import ImageRng
from vlmdefend.types import per_image

DEGREES, SHIFT, SCALE = 5.0, 0.04, 0.08
BRIGHTNESS, CONTRAST, SATURATION = 0.08, 0.08, 0.08
BLUR, BLUR_REACH = (0.5, 1.2), 2  # pixels
NOISE = 0.02
OFTEN = 0.5  # of the colours, the blur and the noise
LUMA = (0.299, 0.587, 0.114)
NUMBERS = 11


def mildly_changed(images: Tensor, rng: ImageRng) -> Tensor:
    """Changes (B, 3, H, W) in [0, 1] slightly, as the views of MAC are (Kim, CVPR 2026, official code).

    Always turned by up to 5 degrees, moved by up to 4 % of the side and resized by up to 8 %, black coming in; then,
    each with probability 1/2, brightness, contrast and saturation by up to 8 %, a blur of 0.5 to 1.2 pixels in five,
    and noise of standard deviation up to 0.02. As the code, but without its hue (up to 0.02), in one order, and the
    moves are interpolated one after the other.
    """
    draws = rng.uniform((NUMBERS,)).to(images)
    signed = 2 * draws - 1
    moved = _moved(images, 1 + SCALE * signed[:, 0], SHIFT * signed[:, 1], SHIFT * signed[:, 2])
    moved = _turned(moved, torch.deg2rad(DEGREES * signed[:, 3]))
    happens = [per_image(draws[:, place] < OFTEN, images) for place in (4, 5, 6)]
    changed = torch.where(happens[0], _recoloured(moved, signed[:, 7:10]), moved)
    low, high = BLUR
    changed = torch.where(happens[1], _blurred(changed, low + (high - low) * draws[:, 10]), changed)
    noise = NOISE * rng.uniform((1,)).to(images)[:, 0]
    noisy = (changed + per_image(noise, images) * rng.normal(images.shape[1:]).to(images)).clamp(0.0, 1.0)
    return torch.where(happens[2], noisy, changed)


def _moved(images: Tensor, scale: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """Resizes about the centre by (B,) ``scale``, then shifts by (B,) shares of the side; black fills in."""
    axes = []
    for size, shift in zip(images.shape[-2:], (down, across), strict=True):
        length = size / scale
        axes.append(axis_weights(size, Span((size - length) / 2 - shift * length, length), whole(size, scale)))
    return resample(images, *axes)


def _turned(images: Tensor, angle: Tensor) -> Tensor:
    """Rotates about the centre, as three shears."""
    down, aside = (torch.arange(size, device=images.device) - (size - 1) / 2 for size in images.shape[-2:])
    across = -(angle / 2).tan()[:, None] * down
    turned = slide(slide(images, across).mT, angle.sin()[:, None] * aside).mT
    return slide(turned, across)


def _recoloured(images: Tensor, signed: Tensor) -> Tensor:
    """Changes brightness, contrast and saturation by factors of (B, 3) ``signed`` times their ranges around 1."""
    factors = [1 + reach * signed[:, place] for place, reach in enumerate((BRIGHTNESS, CONTRAST, SATURATION))]
    bright = (images * per_image(factors[0], images)).clamp(0.0, 1.0)
    grey = _grey(bright).mean(dim=(-2, -1), keepdim=True)
    contrasted = (grey + per_image(factors[1], images) * (bright - grey)).clamp(0.0, 1.0)
    grey = _grey(contrasted)
    return (grey + per_image(factors[2], images) * (contrasted - grey)).clamp(0.0, 1.0)


def _grey(images: Tensor) -> Tensor:
    return (torch.tensor(LUMA).to(images).view(3, 1, 1) * images).sum(dim=1, keepdim=True)


def _blurred(images: Tensor, sigma: Tensor) -> Tensor:
    """Blurs with a Gaussian of (B,) ``sigma`` pixels, cut off after two, edges mirrored."""
    offsets = torch.arange(-BLUR_REACH, BLUR_REACH + 1, device=images.device)
    taps = (-offsets.square() / (2 * sigma[:, None].square())).exp()
    taps = taps / taps.sum(dim=1, keepdim=True)  # (B, 5)
    rows, columns = (_mirrored(taps, offsets, size) for size in images.shape[-2:])
    return resample(images, rows, columns)


def _mirrored(taps: Tensor, offsets: Tensor, size: int) -> Tensor:
    """Turns (B, 5) neighbour weights into a (B, size, size) matrix with mirrored edges."""
    place = torch.arange(size, device=taps.device)
    source = (place[:, None] + offsets).abs()
    source = torch.where(source >= size, 2 * (size - 1) - source, source)
    chosen = torch.nn.functional.one_hot(source, size).to(taps)  # (size, 5, size)
    return torch.einsum("bo,ios->bis", taps, chosen)
