"""A differentiable JPEG round trip, the surrogate of `jpeg` for the adaptive attacker.

Colour transform, 2x2 chroma averaging, 8x8 DCT, quantisation with the standard's tables (ITU-T T.81, annex K) at
libjpeg's quality scaling, and the way back. Rounding keeps its values; its gradient is that of the cubic
approximation of Shin & Song 2017 ("JPEG-resistant adversarial images"), 3 (x - round(x))^2, small where a coefficient
sits firmly on its level, so that the attack spends its budget on coefficients that survive the codec; plus a floor of
0.1, without which a coefficient that is exactly on its level would never move. On the embedded images this breaks
more than the identity, a rounding passed straight through, or the cubic alone (a test holds it to that).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# fmt: off
LUMINANCE = [
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51,
    87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92, 49, 64, 78, 87, 103, 121, 120, 101,
    72, 92, 95, 98, 112, 100, 103, 99,
]
CHROMINANCE = [
    17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99, 24, 26, 56, 99, 99, 99, 99, 99, 47, 66, 99, 99, 99,
    99, 99, 99, *[99] * 32,
]
# fmt: on
FLOOR = 0.1
TO_YCBCR = [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]]


class _Round(torch.autograd.Function):
    """Round, with the gradient 0.1 + 3 (x - round(x))^2."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        rounded = values.round()
        ctx.save_for_backward(values - rounded)
        return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (offset,) = ctx.saved_tensors
        slope: Tensor = FLOOR + 3.0 * offset**2
        return gradients[0] * slope


def jpeg_surrogate(images: Tensor, quality: int) -> Tensor:
    """Approximates the JPEG codec differentiably: (B, 3, H, W) in [0, 1] to the same shape, any H and W."""
    height, width = images.shape[-2:]
    padded = F.pad(images * 255, (0, -width % 16, 0, -height % 16), mode="replicate")
    matrix = images.new_tensor(TO_YCBCR)
    planes = torch.einsum("ij,bjhw->bihw", matrix, padded)
    luma = _through_quantisation(planes[:, :1] - 128, _table(LUMINANCE, quality, images)) + 128
    chroma = F.avg_pool2d(planes[:, 1:], 2)
    chroma = _through_quantisation(chroma, _table(CHROMINANCE, quality, images))
    chroma = F.interpolate(chroma, scale_factor=2, mode="bilinear")
    pixels = torch.einsum("ij,bjhw->bihw", torch.linalg.inv(matrix), torch.cat([luma, chroma], dim=1))
    return (pixels[..., :height, :width] / 255).clamp(0, 1)


def _through_quantisation(planes: Tensor, table: Tensor) -> Tensor:
    """(B, C, H, W) with H, W multiples of 8: DCT per 8x8 block, quantise, back."""
    batch, channels, height, width = planes.shape
    dct = _dct(planes)
    blocks = planes.view(batch, channels, height // 8, 8, width // 8, 8).transpose(3, 4)  # (..., 8, 8)
    levels: Tensor = _Round.apply(dct @ blocks @ dct.T / table)  # type: ignore[no-untyped-call]
    return (dct.T @ (levels * table) @ dct).transpose(3, 4).reshape(batch, channels, height, width)


def _dct(like: Tensor) -> Tensor:
    """The orthonormal 8-point DCT-II matrix."""
    rows = [
        [math.sqrt((1 if k == 0 else 2) / 8) * math.cos(math.pi * (2 * n + 1) * k / 16) for n in range(8)]
        for k in range(8)
    ]
    return like.new_tensor(rows)


def _table(base: list[int], quality: int, like: Tensor) -> Tensor:
    """(8, 8) quantisation steps at ``quality``, as libjpeg scales them."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    return ((like.new_tensor(base).view(8, 8) * scale + 50) / 100).floor().clamp(1, 255)
