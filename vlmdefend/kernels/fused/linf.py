"""The L_inf step in one pass: reads three values per pixel and writes one, 16 bytes."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vlmdefend.kernels.fused.launch import BLOCK, Rows, each, launch
from vlmdefend.kernels.fused.pixel import into_ball, sign
from vlmdefend.kernels.operators import Scale


@triton.jit
def linf_kernel(
    adversarial,
    gradient,
    origin,
    alpha,
    eps,
    count,
    alpha_each: tl.constexpr,
    eps_each: tl.constexpr,
    block: tl.constexpr,
):
    """One block of one image."""
    image = tl.program_id(0).to(tl.int64)
    step = tl.load(alpha + image) if alpha_each else alpha
    radius = tl.load(eps + image) if eps_each else eps
    place = tl.program_id(1) * block + tl.arange(0, block)
    inside = place < count
    at = image * count + place
    x = tl.load(adversarial + at, inside)
    g = tl.load(gradient + at, inside).to(tl.float32)
    o = tl.load(origin + at, inside)
    tl.store(adversarial + at, into_ball(x + step * sign(g), o, radius), inside)


def linf_step_(adversarial: Tensor, gradient: Tensor, origin: Tensor, alpha: Scale, eps: Scale) -> None:
    """:func:`vlmdefend.kernels.linf.reference_`, bit for bit; ``gradient`` keeps its values."""
    if not adversarial.numel():
        return
    laid = Rows(adversarial, gradient, origin)
    x, g, o = laid.rows
    (step, step_each), (radius, radius_each) = each(alpha, x), each(eps, x)
    launch(linf_kernel, x, BLOCK, x, g, o, step, radius, laid.count, alpha_each=step_each, eps_each=radius_each)
    laid.write_back([adversarial])
