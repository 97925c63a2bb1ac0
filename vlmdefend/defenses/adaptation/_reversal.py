"""Gradient reversal: forward the identity, backward minus a coefficient that grows with the iterations."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, coefficient: float) -> Tensor:
        ctx.coefficient = coefficient
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return -ctx.coefficient * gradients[0], None


def reverse(values: Tensor, coefficient: float) -> Tensor:
    """The same values, whose gradient comes back times ``-coefficient`` (Ganin & Lempitsky 2015, eq. 16)."""
    reversed_values: Tensor = _Reversed.apply(values, coefficient)  # type: ignore[no-untyped-call]
    return reversed_values


def reversal_coefficient(iteration: int, highest: float = 1.0, length: int = 1000) -> float:
    """From 0 to ``highest``: 2 h / (1 + exp(-i / length)) - h (Ganin et al. 2016, section 5.2, as tllib writes it)."""
    return 2.0 * highest / (1.0 + math.exp(-iteration / length)) - highest
