"""What the Triton kernels share: sign and clamp as torch has them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sign(values):
    """1, -1, and 0 for zeros and what is not a number."""
    return tl.where(values > 0, 1.0, tl.where(values < 0, -1.0, 0.0))


@triton.jit
def between(values, low, high):
    """Clamp; what is not a number stays so."""
    raised = tl.maximum(values, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(raised, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def into_ball(moved, origin, eps):
    """``clamp01(origin + clamp(moved - origin, -eps, eps))``, rounded after every operation."""
    return between(between(moved - origin, -eps, eps) + origin, 0.0, 1.0)
