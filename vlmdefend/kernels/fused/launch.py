"""Laying images out as rows in the order of their memory, and launching over blocks of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from vlmdefend.kernels.operators import Scale

BLOCK = 1024  # pixels per program: 8 per thread, two vectors of four
REDUCED = 4096  # pixels per partial sum


class Rows:
    """Views of (B, ...) tensors as (B, n) rows, all in one order of pixels: that of the first tensor's memory.

    A tensor laid out like the first (contiguous, channels last, any dense order of an image) is used where it lies; any
    other is copied, and :meth:`write_back` copies it home.
    """

    def __init__(self, *tensors: Tensor) -> None:
        first = tensors[0]
        self._dims = [0, *sorted(range(1, first.dim()), key=lambda dim: -first.stride()[dim])]
        self._dense = [tensor.permute(self._dims).contiguous() for tensor in tensors]
        self.rows = [tensor.view(len(first), -1) for tensor in self._dense]
        self.count = self.rows[0].shape[1]

    def stride(self, dim: int) -> int:
        """How far apart in a row two neighbours along ``dim`` of the tensors lie."""
        return self._dense[0].stride(self._dims.index(dim))

    def write_back(self, changed: Sequence[Tensor]) -> None:
        """Copy home what was copied to be changed: the first ``len(changed)`` tensors."""
        for tensor, dense in zip(changed, self._dense, strict=False):
            if dense.data_ptr() != tensor.data_ptr():
                tensor.permute(self._dims).copy_(dense)


def launch(kernel: Any, rows: Tensor, block: int, *arguments: Any, **constants: Any) -> None:
    """Run ``kernel`` on a grid (rows, blocks of a row), on the rows' own device.

    No multiplication is fused into an addition: the specification rounds between them.
    """
    with torch.cuda.device_of(rows):
        kernel[(rows.shape[0], triton.cdiv(rows.shape[1], block))](
            *arguments, block=block, enable_fp_fusion=False, **constants
        )


def each(scale: Scale, rows: Tensor) -> tuple[Scale, bool]:
    """A scale as a kernel takes it, and whether it is one per image: then float32 beside the rows, contiguous."""
    if isinstance(scale, Tensor):
        return scale.to(rows.device, torch.float32).expand(rows.shape[0]).contiguous(), True
    return float(scale), False
