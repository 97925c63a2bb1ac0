"""Tensors that every kernel must cope with.

The folder ``interpreted`` runs in a process of its own, started by test_interpreted.py: Triton decides when it is
imported whether it interprets.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]

Layout = Callable[[Tensor], Tensor]


def transposed(images: Tensor) -> Tensor:
    """The same values, rows and columns swapped in memory."""
    return images.transpose(-1, -2).contiguous().transpose(-1, -2)


def strided(images: Tensor) -> Tensor:
    """The same values with gaps between them: no dense order at all."""
    return images.repeat_interleave(2, dim=-1)[..., ::2]


def batch_inside(images: Tensor) -> Tensor:
    """The same values, the images of the batch interleaved in memory."""
    return images.transpose(0, 1).contiguous().transpose(0, 1)


def channels_last(images: Tensor) -> Tensor:
    """The same values, the channels of a pixel side by side."""
    return images.to(memory_format=torch.channels_last)


LAYOUTS: dict[str, Layout] = {
    "contiguous": Tensor.contiguous,
    "channels_last": channels_last,
    "transposed": transposed,
    "strided": strided,
    "batch_inside": batch_inside,
}
SHAPES = [(1, 3, 8, 8), (3, 3, 17, 19), (2, 3, 32, 40), (2, 1, 1, 5)]


def images_around(shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Clean images, images near them, and a gradient with zeros, infinities and what is not a number in it."""
    generator = torch.Generator().manual_seed(seed)
    origin = torch.rand(shape, generator=generator)
    near = (origin + 0.05 * torch.randn(shape, generator=generator)).clamp(0, 1)
    gradient = torch.randn(shape, generator=generator)
    flat = gradient.view(-1)
    flat[::5], flat[1::11], flat[2::13] = 0.0, float("nan"), float("inf")
    return origin, near, gradient


def scales(each: bool, count: int, *values: float) -> list[float] | list[Tensor]:
    """The numbers, or per image tensors that begin with them, the last image's zero."""
    if not each:
        return list(values)
    ramp = torch.linspace(1.0, 0.0, count) if count > 1 else torch.ones(1)
    return [ramp * value for value in values]
