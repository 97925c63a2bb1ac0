"""The attacks of training under adaptation: every image gets every step, the last iterate counts."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmdefend.kernels.linf import linf_step_
from vlmdefend.kernels.start import noisy
from vlmdefend.rng import ImageRng


def ascend(
    loss: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    eps: float,
    alpha: float,
    steps: int,
    rng: ImageRng | None = None,
) -> Tensor:
    """L_inf steps along the sign of the gradient of ``loss``; no parameter collects a gradient.

    Args:
        loss: of float32 (B, 3, H, W), to a scalar, a sum over the images.
        images: (B, 3, H, W) in [0, 1]. Not changed.
        eps: radius; alpha: step size.
        steps: how many.
        rng: one stream per image for a start drawn uniformly from the ball; None: start at the image (BIM).

    Returns:
        (B, 3, H, W) in [0, 1] and within ``eps``; no gradient.
    """
    if rng is None or eps == 0:
        adversarial = images.detach().clone()
    else:
        adversarial = noisy(images, rng.uniform(images.shape[1:], -1.0, 1.0).to(images.device), eps)
    for _ in range(steps):
        pixels = adversarial.requires_grad_(True)
        with torch.enable_grad():
            value = loss(pixels)
        (gradient,) = torch.autograd.grad(value, pixels)
        adversarial = linf_step_(pixels.detach(), gradient, images, alpha, eps)
    return adversarial.detach()


def away_from(logits: Callable[[Tensor], Tensor], labels: Tensor) -> Callable[[Tensor], Tensor]:
    """The summed cross-entropy of ``labels``."""
    return lambda images: F.cross_entropy(logits(images), labels, reduction="sum")


def away_from_prediction(logits: Callable[[Tensor], Tensor], images: Tensor) -> Callable[[Tensor], Tensor]:
    """The summed KL from the prediction at ``images`` (TRADES, Zhang et al. 2019); wants a random start."""
    with torch.no_grad():
        clean = logits(images).log_softmax(dim=1)
    return lambda moved: F.kl_div(logits(moved).log_softmax(dim=1), clean, reduction="sum", log_target=True)
