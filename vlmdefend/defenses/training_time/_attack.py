"""The attack inside adversarial training: PGD as papers train with it, for the cost of its gradients alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmdefend.kernels.linf import linf_step_
from vlmdefend.kernels.start import noisy
from vlmdefend.rng import ImageRng


def train_pgd(
    logits: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    rng: ImageRng,
    *,
    eps: float,
    steps: int,
    alpha: float,
) -> Tensor:
    """Runs untargeted L_inf PGD on the summed cross-entropy: uniform start, all steps, last iterate.

    The attacks of ``vlmdefend.attacks`` look for the verdict: they predict the clean images, leave out what is wrong,
    keep the best iterate and evaluate the last one. In training that would be two more forwards on top of ``steps``
    gradients, and another training distribution than the papers'. What is the same is the step
    (:func:`~vlmdefend.kernels.linf.linf_step_`), float32, and that no parameter's ``.grad`` is touched.

    Args:
        logits: float32, in evaluation mode, from (B, 3, H, W) to (B, C).
        images: (B, 3, H, W) in [0, 1]. Not changed.
        labels: (B,) true classes.
        rng: one stream per image, for the start.
        eps: radius; alpha: step size; in pixel units.

    Returns:
        (B, 3, H, W) in [0, 1] and within ``eps``; no gradient.
    """
    return ascend(
        lambda pixels: F.cross_entropy(logits(pixels), labels, reduction="sum"),
        images,
        rng,
        eps=eps,
        steps=steps,
        alpha=alpha,
    )


def ascend(
    loss: Callable[[Tensor], Tensor],
    images: Tensor,
    rng: ImageRng | None = None,
    *,
    eps: float,
    steps: int,
    alpha: float,
    start: float | None = None,
) -> Tensor:
    """Runs :func:`train_pgd` for any loss that is a sum over the images.

    Args:
        loss: float32, from (B, 3, H, W) to a number.
        rng: one stream per image for a start that is uniform in a box; None: start at the image (BIM).
        start: radius of that box; None: ``eps``.

    Returns:
        (B, 3, H, W) in [0, 1] and within ``eps``; no gradient.
    """
    if rng is None:
        adversarial = images.detach().clone()
    else:
        noise = rng.uniform(images.shape[1:], -1.0, 1.0).to(images.device)
        adversarial = noisy(images, noise, eps if start is None else start)
    for _ in range(steps):
        pixels = adversarial.requires_grad_(True)
        with torch.enable_grad():
            total = loss(pixels)
        (gradient,) = torch.autograd.grad(total, pixels)
        adversarial = linf_step_(pixels.detach(), gradient, images, alpha, eps)
    return adversarial
