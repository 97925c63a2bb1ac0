"""Auto-PGD's L_inf step in one pass: reads four values per pixel and writes one, 20 bytes."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vlmdefend.kernels.fused.launch import BLOCK, Rows, each, launch
from vlmdefend.kernels.fused.pixel import between, sign
from vlmdefend.kernels.operators import Scale


@triton.jit
def apgd_kernel(
    before, images, gradient, origin, size, weight, eps, count, eps_each: tl.constexpr, block: tl.constexpr
):
    """One block of one image."""
    image = tl.program_id(0).to(tl.int64)
    step = tl.load(size + image)
    share = tl.load(weight + image)
    radius = tl.load(eps + image) if eps_each else eps
    place = tl.program_id(1) * block + tl.arange(0, block)
    inside = place < count
    at = image * count + place
    past = tl.load(before + at, inside)
    x = tl.load(images + at, inside)
    g = tl.load(gradient + at, inside).to(tl.float32)
    o = tl.load(origin + at, inside)
    low = tl.maximum(o - radius, 0.0)
    high = tl.minimum(o + radius, 1.0)
    z = between(step * sign(g) + x, low, high)
    drift = (x - past) * (1.0 - share)
    tl.store(before + at, between((z - x) * share + x + drift, low, high), inside)


def apgd_linf_step_(
    before: Tensor, images: Tensor, gradient: Tensor, origin: Tensor, size: Tensor, weight: Tensor, eps: Scale
) -> None:
    """:func:`vlmdefend.kernels.apgd.reference_`, bit for bit; ``gradient`` keeps its values."""
    if not before.numel():
        return
    laid = Rows(before, images, gradient, origin)
    past, x, g, o = laid.rows
    (step, _), (share, _), (radius, radius_each) = each(size, x), each(weight, x), each(eps, x)
    launch(apgd_kernel, x, BLOCK, past, x, g, o, step, share, radius, laid.count, eps_each=radius_each)
    laid.write_back([before])
