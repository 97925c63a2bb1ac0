"""The weights of a linear resize, one matrix per axis, stored as the band of each row that is not zero."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RowWeights(NamedTuple):
    """The weights of (outputs, inputs) matrix rows that lie between the first and the last that is not zero."""

    first: Tensor  # (outputs,) int32, where a row's weights begin
    weights: Tensor  # (outputs, T)


class AxisResize(NamedTuple):
    """The resize of one axis from n to S pixels."""

    matrix: Tensor  # (S, n)
    forward: RowWeights  # of the matrix
    backward: RowWeights  # of its transpose

    @classmethod
    def of(cls, matrix: Tensor) -> AxisResize:
        """(S, n) weights, outputs by inputs."""
        return cls(matrix, row_weights(matrix), row_weights(matrix.T))


def row_weights(matrix: Tensor) -> RowWeights:
    """The band of a (outputs, inputs) matrix; as many row_weights for every row as the widest row needs."""
    used = (matrix != 0).long()
    count = matrix.shape[1]
    first = used.argmax(dim=1)
    last = (count - 1 - used.flip(1).argmax(dim=1)).where(used.any(dim=1), first)
    width = int((last - first).max()) + 1
    first = first.clamp(max=count - width)
    columns = first[:, None] + torch.arange(width, device=matrix.device)
    return RowWeights(first.int(), matrix.gather(1, columns).contiguous())
