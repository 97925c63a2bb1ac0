"""The L2 step in two passes over the pixels: three sums (12 bytes per value), then the step (12 read, 4 written).

With d = adversarial - origin and u = g / ||g|| the length after the step needs no pass of its own:
``||d + alpha u||^2 = ||d||^2 + 2 alpha <d, u> + alpha^2``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vlmdefend.kernels.fused.launch import BLOCK, REDUCED, Rows, each, launch
from vlmdefend.kernels.fused.pixel import between
from vlmdefend.kernels.operators import Scale


@triton.jit
def sums_kernel(adversarial, gradient, origin, sums, count, parts, block: tl.constexpr):
    """g g, d g and d d summed over one block of one image, into (B, 3, parts)."""
    image = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * block + tl.arange(0, block)
    inside = place < count
    at = image * count + place
    g = tl.load(gradient + at, inside, other=0.0).to(tl.float32)
    d = tl.load(adversarial + at, inside, other=0.0) - tl.load(origin + at, inside, other=0.0)
    row = sums + image * 3 * parts + tl.program_id(1)
    tl.store(row, tl.sum(g * g, axis=0))
    tl.store(row + parts, tl.sum(d * g, axis=0))
    tl.store(row + 2 * parts, tl.sum(d * d, axis=0))


@triton.jit
def scales_kernel(
    sums, scales, alpha, eps, parts, alpha_each: tl.constexpr, eps_each: tl.constexpr, block: tl.constexpr
):
    """One image's alpha / ||g||, 0 where it cannot be used, and min(1, eps / ||moved||), from its sums, in float64."""
    image = tl.program_id(0).to(tl.int64)
    step = tl.cast(tl.load(alpha + image) if alpha_each else alpha, tl.float64)
    radius = tl.cast(tl.load(eps + image) if eps_each else eps, tl.float64)
    part = tl.arange(0, block)
    row = sums + image * 3 * parts + part
    gg = tl.sum(tl.load(row, part < parts, other=0.0).to(tl.float64), axis=0)
    dg = tl.sum(tl.load(row + parts, part < parts, other=0.0).to(tl.float64), axis=0)
    dd = tl.sum(tl.load(row + 2 * parts, part < parts, other=0.0).to(tl.float64), axis=0)
    length = tl.sqrt(gg)
    usable = (length > 0) & (length < float("inf"))
    scale = tl.where(usable, step / tl.maximum(length, 1e-12), 0.0)
    moved = tl.sqrt(tl.maximum(tl.where(usable, dd + scale * (2 * dg + scale * gg), dd), 0.0))
    tl.store(scales + 2 * image, scale.to(tl.float32))
    tl.store(scales + 2 * image + 1, tl.minimum(radius / tl.maximum(moved, 1e-12), 1.0).to(tl.float32))


@triton.jit
def l2_kernel(adversarial, gradient, origin, scales, count, block: tl.constexpr):
    """One block of one image."""
    image = tl.program_id(0).to(tl.int64)
    scale = tl.load(scales + 2 * image)
    shrink = tl.load(scales + 2 * image + 1)
    place = tl.program_id(1) * block + tl.arange(0, block)
    inside = place < count
    at = image * count + place
    x = tl.load(adversarial + at, inside)
    g = tl.load(gradient + at, inside).to(tl.float32)
    o = tl.load(origin + at, inside)
    delta = x + tl.where(scale > 0, g * scale, 0.0) - o
    tl.store(adversarial + at, between(delta * shrink + o, 0.0, 1.0), inside)


def l2_step_(adversarial: Tensor, gradient: Tensor, origin: Tensor, alpha: Scale, eps: Scale) -> None:
    """:func:`vlmdefend.kernels.l2.reference_`, but for the order in which squares are summed.

    The two lengths differ in their last bits: by a few units in the last place for alpha up to 2 eps, which moves a
    pixel by as many units of its distance from the origin. ``gradient`` keeps its values.
    """
    if not adversarial.numel():
        return
    laid = Rows(adversarial, gradient, origin)
    x, g, o = laid.rows
    parts = triton.cdiv(laid.count, REDUCED)
    sums = x.new_empty(x.shape[0], 3, parts)
    launch(sums_kernel, x, REDUCED, x, g, o, sums, laid.count, parts)
    scales = x.new_empty(x.shape[0], 2)
    (step, step_each), (radius, radius_each) = each(alpha, x), each(eps, x)
    launch(
        scales_kernel,
        scales,
        triton.next_power_of_2(parts),
        *(sums, scales, step, radius, parts),
        alpha_each=step_each,
        eps_each=radius_each,
    )
    launch(l2_kernel, x, BLOCK, x, g, o, scales, laid.count)
    laid.write_back([adversarial])
