"""Resize and normalisation in one pass, for images and for their gradients: every pixel gathers its few taps.

Each image is read once from memory (its taps come again from the cache) and each result is written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmdefend.kernels.fused.launch import launch
from vlmdefend.kernels.resize_weights import RowWeights

GATHERED = 256  # pixels per program


@triton.jit
def resize_kernel(
    found,
    images,
    row_first,
    row_weights,
    column_first,
    column_weights,
    mean,
    std,
    count,
    width,
    channels,
    stride_image,
    stride_channel,
    stride_row,
    stride_column,
    row_taps,
    column_taps,
    block: tl.constexpr,
):
    """One block of one channel of one image: ``(sum_r sum_c w_r w_c image[r, c] - mean) / std`` per pixel."""
    plane = tl.program_id(0).to(tl.int64)
    channel = plane % channels
    place = tl.program_id(1) * block + tl.arange(0, block)
    inside = place < count
    row, column = place // width, place % width
    top = tl.load(row_first + row, inside, other=0)
    left = tl.load(column_first + column, inside, other=0)
    source = images + plane // channels * stride_image + channel * stride_channel + left * stride_column
    total = tl.zeros([block], tl.float32)
    for r in range(row_taps):
        line = tl.zeros([block], tl.float32)
        for c in range(column_taps):
            weight = tl.load(column_weights + column * column_taps + c, inside, other=0.0)
            line += weight * tl.load(source + (top + r) * stride_row + c * stride_column, inside, other=0.0).to(
                tl.float32
            )
        total += tl.load(row_weights + row * row_taps + r, inside, other=0.0) * line
    shifted = total - tl.load(mean + channel)
    tl.store(found + plane * count + place, tl.div_rn(shifted, tl.load(std + channel)), inside)


def resized_normalized(images: Tensor, rows: RowWeights, columns: RowWeights, mean: Tensor, std: Tensor) -> Tensor:
    """(B, C, H, W) of any strides -> (B, C, outputs of rows, outputs of columns), contiguous, float32.

    The reference adds in the order of two matrix products, this kernel tap by tap: results differ by a few units in
    the last place of the largest tap.
    """
    height, width = rows.first.shape[0], columns.first.shape[0]
    batch, channels = images.shape[:2]
    found = torch.empty(batch, channels, height, width, device=images.device)
    if found.numel():
        launch(
            resize_kernel,
            found.view(batch * channels, height * width),
            GATHERED,
            *(found, images, rows.first, rows.weights, columns.first, columns.weights),
            *(mean.contiguous(), std.contiguous(), height * width, width, channels, *images.stride()),
            *(rows.weights.shape[1], columns.weights.shape[1]),
        )
    return found
