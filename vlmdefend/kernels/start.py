"""Where an attack starts: the clean image plus scaled noise, clamped to [0, 1]."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmdefend.kernels.dispatch import through_op, uses_triton
from vlmdefend.kernels.operators import Scale, joined, operator, split
from vlmdefend.kernels.shape import per_image


def noisy(images: Tensor, noise: Tensor, eps: Scale) -> Tensor:
    """``clamp01(images + noise eps)``, a new tensor.

    Args:
        images: (B, ...) float32 clean images.
        noise: (B, ...) float32, drawn from the unit ball, on the images' device.
        eps: radius, a number or (B,).
    """
    if through_op(images):
        found: Tensor = _operator(images, noise, *split(eps))
        return found
    return reference(images, noise, eps)


def reference(images: Tensor, noise: Tensor, eps: Scale) -> Tensor:
    """The start in torch: the specification."""
    scaled = noise * (per_image(eps.to(images.device, images.dtype), noise) if isinstance(eps, Tensor) else eps)
    return (images + scaled).clamp_(0.0, 1.0)


def _body(images: Tensor, noise: Tensor, eps: float, eps_each: Tensor | None) -> Tensor:
    if uses_triton(images):
        from vlmdefend.kernels.fused.start import noisy as fused

        return fused(images, noise, joined(eps, eps_each))
    return reference(images, noise, joined(eps, eps_each))


_operator = operator(
    "noisy(Tensor images, Tensor noise, float eps, Tensor? eps_each) -> Tensor",
    _body,
    lambda images, noise, eps, eps_each: torch.empty_like(images),
)
