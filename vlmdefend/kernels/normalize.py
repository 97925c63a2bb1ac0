"""Pixels in [0, 1] to a network's input: subtract a mean per channel, divide by a deviation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmdefend.kernels.dispatch import through_op, uses_triton
from vlmdefend.kernels.operators import operator


def normalized(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Normalises (B, C, H, W) float32 by (C, 1, 1) mean and std: a new tensor, differentiable.

    The gradient is divided by std, which torch does in one pass: it has no kernel of its own.
    """
    if through_op(images):
        found: Tensor = _operator(images, mean, std)
        return found
    return reference(images, mean, std)


def reference(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Normalisation in torch: the specification."""
    return (images - mean).div_(std)


def _body(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    if uses_triton(images):
        from vlmdefend.kernels.fused.normalize import normalized as fused

        return fused(images, mean, std)
    return reference(images, mean, std)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[2])


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    return gradient / ctx.saved_tensors[0], None, None


_operator = operator(
    "normalized(Tensor images, Tensor mean, Tensor std) -> Tensor",
    _body,
    lambda images, mean, std: torch.empty_like(images),
)
_operator.register_autograd(_backward, setup_context=_keep)
