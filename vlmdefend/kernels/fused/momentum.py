"""The momentum step in two passes: |g| summed per block (4 bytes per value), then the step (16 read, 8 written)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vlmdefend.kernels.fused.launch import BLOCK, REDUCED, Rows, each, launch
from vlmdefend.kernels.fused.pixel import into_ball, sign
from vlmdefend.kernels.operators import Scale


@triton.jit
def absolute_sum_kernel(gradient, sums, count, parts, block: tl.constexpr):
    """The sum of |g| over one block of one image."""
    image = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * block + tl.arange(0, block)
    g = tl.load(gradient + image * count + place, place < count, other=0.0).to(tl.float32)
    tl.store(sums + image * parts + tl.program_id(1), tl.sum(tl.abs(g), axis=0))


@triton.jit
def momentum_kernel(
    adversarial,
    gradient,
    momentum,
    origin,
    sums,
    alpha,
    eps,
    decay,
    count,
    parts,
    alpha_each: tl.constexpr,
    eps_each: tl.constexpr,
    parts_block: tl.constexpr,
    block: tl.constexpr,
):
    """One block of one image; every block adds up the image's partial sums again, in the same order."""
    image = tl.program_id(0).to(tl.int64)
    step = tl.load(alpha + image) if alpha_each else alpha
    radius = tl.load(eps + image) if eps_each else eps
    part = tl.arange(0, parts_block)
    total = tl.sum(tl.load(sums + image * parts + part, part < parts, other=0.0), axis=0)
    size = tl.div_rn(total, count.to(tl.float32))
    usable = (size > 0) & (size < float("inf"))
    place = tl.program_id(1) * block + tl.arange(0, block)
    inside = place < count
    at = image * count + place
    g = tl.load(gradient + at, inside).to(tl.float32)
    m = tl.load(momentum + at, inside)
    x = tl.load(adversarial + at, inside)
    o = tl.load(origin + at, inside)
    m = decay * m + tl.where(usable, tl.div_rn(g, tl.where(usable, size, 1.0)), 0.0)
    tl.store(momentum + at, m, inside)
    tl.store(adversarial + at, into_ball(x + step * sign(m), o, radius), inside)


def momentum_linf_step_(
    adversarial: Tensor,
    gradient: Tensor,
    momentum: Tensor,
    origin: Tensor,
    alpha: Scale,
    eps: Scale,
    decay: float,
) -> None:
    """:func:`vlmdefend.kernels.momentum.reference_`, but for the order in which |g| is summed.

    The mean differs in its last bits (tests: 4 units in the last place), and so does the momentum; given the momentum,
    the step is equal bit for bit. ``gradient`` keeps its values.
    """
    if not adversarial.numel():
        return
    laid = Rows(adversarial, momentum, gradient, origin)
    x, m, g, o = laid.rows
    parts = triton.cdiv(laid.count, REDUCED)
    sums = x.new_empty(x.shape[0], parts)
    launch(absolute_sum_kernel, x, REDUCED, g, sums, laid.count, parts)
    (step, step_each), (radius, radius_each) = each(alpha, x), each(eps, x)
    launch(
        momentum_kernel,
        x,
        BLOCK,
        *(x, g, m, o, sums, step, radius, float(decay), laid.count, parts),
        alpha_each=step_each,
        eps_each=radius_each,
        parts_block=triton.next_power_of_2(parts),
    )
    laid.write_back([adversarial, momentum])
