"""Gradient reversal: the identity forward, the negative gradient times a growing coefficient backward."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vlmdefend.defenses.adaptation.base import AdaptedStudent


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, coefficient: float) -> Tensor:
        ctx.coefficient = coefficient
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return -ctx.coefficient * gradients[0], None


def reverse(values: Tensor, coefficient: float) -> Tensor:
    """Returns the same values, with the gradient multiplied by ``-coefficient`` (Ganin & Lempitsky 2015, eq. 16)."""
    reversed_values: Tensor = _Reversed.apply(values, coefficient)  # type: ignore[no-untyped-call]
    return reversed_values


def reversal_coefficient(iteration: int, highest: float = 1.0, length: int = 1000) -> float:
    """From 0 to ``highest``: 2 h / (1 + exp(-i / length)) - h, as tllib writes it."""
    return 2.0 * highest / (1.0 + math.exp(-iteration / length)) - highest


def scheduled(student: AdaptedStudent, warm_up: int | None) -> float:
    """Returns the coefficient of this step: grown in ``warm_up`` steps, or with the finished share of the stage.

    Ganin et al. 2016 (section 5.2) have 2 / (1 + exp(-10 p)) - 1 with the share p: a tenth of the stage. The 1000 of
    tllib is that for 10,000 steps. Where adversarial images pull the domains apart, a discriminator that meets no
    resistance at first tells them apart for good (the code of Wang et al. 2024 has no warm-up at all).
    """
    return reversal_coefficient(student.iteration, length=warm_up or max(1, student.steps // 10))
