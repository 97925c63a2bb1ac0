"""The L_inf step of Auto-PGD: a sign step and a share of the step before (Croce & Hein 2020, eq. 3), in place."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmdefend.kernels.dispatch import through_op, uses_triton
from vlmdefend.kernels.operators import Scale, joined, operator, split
from vlmdefend.kernels.shape import per_image


def apgd_linf_step_(
    before: Tensor, images: Tensor, gradient: Tensor, origin: Tensor, size: Tensor, weight: Tensor, eps: Scale
) -> Tensor:
    """``z = P(x + size sign(g))``, then ``before <- P(x + w (z - x) + (1 - w)(x - before))``.

    The order of operations is that of the authors' code, so that the iterates are equal to theirs bit for bit.

    Args:
        before: (B, ...) float32, the iterate before; holds the following one afterwards and is returned.
        images: (B, ...) the iterate x. Not changed.
        gradient: (B, ...) gradient of the loss to be raised, float32 or bfloat16; undefined afterwards.
        origin: (B, ...) clean images; P goes into their L_inf ball of radius ``eps`` and into [0, 1].
        size: (B,) step size in pixel units.
        weight: (B,) w, the share of the new step.
        eps: radius, a number or (B,).
    """
    if through_op(before):
        _operator(before, images, gradient, origin, size, weight, *split(eps))
        return before
    return reference_(before, images, gradient, origin, size, weight, eps)


def reference_(
    before: Tensor, images: Tensor, gradient: Tensor, origin: Tensor, size: Tensor, weight: Tensor, eps: Scale
) -> Tensor:
    """The step in torch: the specification."""
    radius = per_image(eps.to(images.device, images.dtype), images) if isinstance(eps, Tensor) else eps
    low, high = (origin - radius).clamp_(min=0.0), (origin + radius).clamp_(max=1.0)
    share = per_image(weight, images)
    z = (per_image(size, images) * gradient.sign_()).add_(images).clamp_(min=low, max=high)
    drift = torch.sub(images, before, out=before).mul_(1.0 - share)
    return torch.clamp(z.sub_(images).mul_(share).add_(images).add_(drift), min=low, max=high, out=before)


def _body(
    before: Tensor,
    images: Tensor,
    gradient: Tensor,
    origin: Tensor,
    size: Tensor,
    weight: Tensor,
    eps: float,
    eps_each: Tensor | None,
) -> None:
    if uses_triton(before):
        from vlmdefend.kernels.fused.apgd import apgd_linf_step_ as fused_

        fused_(before, images, gradient, origin, size, weight, joined(eps, eps_each))
    else:
        reference_(before, images, gradient, origin, size, weight, joined(eps, eps_each))


_operator = operator(
    "apgd_linf_step_(Tensor(a!) before, Tensor images, Tensor(b!) gradient, Tensor origin, "
    "Tensor size, Tensor weight, float eps, Tensor? eps_each) -> ()",
    _body,
    lambda *arguments: None,
)
