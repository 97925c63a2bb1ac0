"""The tables that the fused resize gathers by hold the whole matrix, in few taps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlmdefend.kernels.normalize import normalized
from vlmdefend.kernels.resize import resized_normalized
from vlmdefend.kernels.resize_weights import AxisResize, RowWeights, row_weights


def bicubic(size: int, side: int) -> Tensor:
    rows = torch.eye(size).view(1, 1, size, size)
    return F.interpolate(rows, (side, size), mode="bicubic", antialias=side < size)[0, 0]


def dense(table: RowWeights, inputs: int) -> Tensor:
    matrix = torch.zeros(len(table.first), inputs)
    for row, first in enumerate(table.first.tolist()):
        matrix[row, first : first + table.weights.shape[1]] = table.weights[row]
    return matrix


@pytest.mark.parametrize(("size", "side", "most"), [(8, 20, 4), (20, 32, 4), (48, 32, 7), (448, 224, 8), (3, 32, 3)])
def test_tables_are_the_matrix_and_its_transpose(size: int, side: int, most: int) -> None:
    """Enlarging takes at most 4 taps, shrinking by s at most 4 s + 1."""
    axis = AxisResize.of(bicubic(size, side))
    assert torch.equal(dense(axis.forward, size), axis.matrix)
    assert torch.equal(dense(axis.backward, side), axis.matrix.T)
    assert axis.forward.weights.shape[1] <= most


def test_an_input_that_no_output_sees_has_no_weight() -> None:
    matrix = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    table = row_weights(matrix.T)
    assert table.weights.shape == (3, 1)
    assert torch.equal(dense(table, 2), matrix.T)


def test_the_operator_resizes_normalises_and_returns_the_gradient() -> None:
    rows, columns = AxisResize.of(bicubic(6, 8)), AxisResize.of(bicubic(11, 8))
    mean, std = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    images = torch.rand(2, 3, 6, 11, generator=torch.Generator().manual_seed(0), requires_grad=True)
    expected = normalized(rows.matrix @ images @ columns.matrix.T, mean, std)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad(expected, images, upstream)
    tables = (rows.matrix, *rows.forward, *rows.backward, columns.matrix, *columns.forward, *columns.backward)
    found = torch.ops.vlmdefend.resized_normalized(images, *tables, mean, std)
    assert torch.equal(found, expected)
    assert torch.equal(resized_normalized(images, rows, columns, mean, std), expected)
    assert torch.allclose(torch.autograd.grad(found, images, upstream)[0], gradient, rtol=1e-5, atol=1e-6)
