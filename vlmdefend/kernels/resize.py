"""A linear resize (bicubic, with or without a filter before) from the native resolution, and normalisation with it.

A resize is a matrix per axis. In torch it is two matrix products. A row of such a matrix holds few weights, side by
side (4 where bicubic enlarges), so that the fused kernel gathers them for each pixel and keeps nothing in between.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmdefend.kernels import normalize
from vlmdefend.kernels.dispatch import through_op, uses_triton
from vlmdefend.kernels.operators import operator
from vlmdefend.kernels.resize_weights import AxisResize, RowWeights


def resized(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Resizes (B, C, H, W) by (S, H) and (S, W) weights to (B, C, S, S); an axis of the right size stays."""
    if rows.shape[0] != rows.shape[1]:
        images = rows @ images
    if columns.shape[0] != columns.shape[1]:
        images = images @ columns.T
    return images


def resized_normalized(images: Tensor, rows: AxisResize, columns: AxisResize, mean: Tensor, std: Tensor) -> Tensor:
    """``(resized(images) - mean) / std``, differentiable; (B, C, H, W) float32 -> (B, C, S, S).

    Args:
        images: at their native resolution.
        rows: the resize of the vertical axis; columns: of the horizontal one.
        mean: (C, 1, 1); std: (C, 1, 1).
    """
    if through_op(images):
        found: Tensor = _operator(images, *_flat(rows), *_flat(columns), mean, std)
        return found
    return normalize.reference(resized(images, rows.matrix, columns.matrix), mean, std)


def _flat(axis: AxisResize) -> tuple[Tensor, ...]:
    return axis.matrix, *axis.forward, *axis.backward


def _body(images: Tensor, *tables: Tensor) -> Tensor:
    rows, columns, mean, std = _axes(tables)
    if uses_triton(images):
        from vlmdefend.kernels.fused.resize import resized_normalized as fused

        return fused(images, rows.forward, columns.forward, mean, std)
    return normalize.reference(resized(images, rows.matrix, columns.matrix), mean, std)


def _body_back(gradient: Tensor, *tables: Tensor) -> Tensor:
    rows, columns, mean, std = _axes(tables)
    if uses_triton(gradient):
        from vlmdefend.kernels.fused.resize import resized_normalized as fused

        return fused(gradient, rows.backward, columns.backward, torch.zeros_like(mean), std)
    return resized(gradient / std, rows.matrix.T, columns.matrix.T)


def _axes(tables: tuple[Tensor, ...]) -> tuple[AxisResize, AxisResize, Tensor, Tensor]:
    rows, columns = (AxisResize(t[0], RowWeights(*t[1:3]), RowWeights(*t[3:5])) for t in (tables[:5], tables[5:10]))
    return rows, columns, tables[10], tables[11]


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return _operator_back(gradient, *ctx.saved_tensors), *[None] * 12


_TABLES = ", ".join(
    [
        *(
            f"Tensor {a}_{part}"
            for a in ("row", "column")
            for part in ("matrix", "first", "taps", "first_back", "taps_back")
        ),
        "Tensor mean",
        "Tensor std",
    ]
)
_operator_back = operator(
    f"resized_normalized_back(Tensor gradient, {_TABLES}) -> Tensor",
    _body_back,
    lambda gradient, *t: gradient.new_empty(*gradient.shape[:2], t[0].shape[1], t[5].shape[1]),
)
_operator = operator(
    f"resized_normalized(Tensor images, {_TABLES}) -> Tensor",
    _body,
    lambda images, *t: images.new_empty(*images.shape[:2], t[0].shape[0], t[5].shape[0]),
)
_operator.register_autograd(_backward, setup_context=_keep)
