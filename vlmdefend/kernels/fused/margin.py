"""Margin and DLR with their gradient: the logits of one image are read once, their gradient is written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmdefend.kernels.fused.launch import launch


@triton.jit
def logit_loss_kernel(logits, classes, values, gradients, count, ratio: tl.constexpr, block: tl.constexpr):
    """One image: the margin, or with ``ratio`` the difference of logits ratio; d loss / d logits beside it.

    A row that holds what is not a number has that for its loss, and its gradient is undefined.
    """
    image = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, block)
    inside = place < count
    lowest = float("-inf")
    z = tl.load(logits + image * count + place, inside, other=lowest).to(tl.float32)
    own = place == tl.load(classes + image)
    label = tl.sum(tl.where(own, z, 0.0), axis=0)
    others = tl.where(own, lowest, z)
    best = tl.max(others, axis=0)
    tied = (others == best) & inside
    ties = tl.sum(tied.to(tl.float32), axis=0)
    value = best - label
    pull = 1.0
    top = tl.zeros([block], tl.float32)
    if ratio:
        first = tl.max(z, axis=0)
        first_at = tl.min(tl.where((z == first) & inside, place, block), axis=0)
        rest = tl.where(place == first_at, lowest, z)
        second = tl.max(rest, axis=0)
        second_at = tl.min(tl.where((rest == second) & inside & (place != first_at), place, block), axis=0)
        rest = tl.where(place == second_at, lowest, rest)
        third = tl.max(rest, axis=0)
        taken = (place == first_at) | (place == second_at)
        third_at = tl.min(tl.where((rest == third) & inside & ~taken, place, block), axis=0)
        spread = first - third + 1e-12
        value = tl.div_rn(value, spread)
        pull = tl.div_rn(1.0, spread)
        slope = tl.div_rn(value, spread)
        top = tl.where(place == first_at, -slope, tl.where(place == third_at, slope, 0.0))
    broken = tl.max(tl.where(z == z, 0, 1), axis=0) > 0
    share = tl.where(tied, tl.div_rn(pull, ties), tl.where(own, -pull, 0.0))
    gradient = share + top
    tl.store(values + image, tl.where(broken, float("nan"), value))
    tl.store(gradients + image * count + place, gradient.to(gradients.dtype.element_ty), inside)


def loss_and_gradient(logits: Tensor, classes: Tensor, ratio: bool) -> tuple[Tensor, Tensor]:
    """(B,) float32 and (B, C): :func:`vlmdefend.kernels.margin.reference_margin` or ``reference_dlr``, bit for bit."""
    z = logits.contiguous()
    values = z.new_empty(len(z), dtype=torch.float32)
    gradients = torch.empty_like(z)
    if z.numel():
        block = triton.next_power_of_2(z.shape[1])
        launch(
            logit_loss_kernel,
            z,
            block,
            *(z, classes.contiguous(), values, gradients, z.shape[1]),
            ratio=ratio,
            num_warps=4 if block <= 2048 else 16,
        )
    return values, gradients
