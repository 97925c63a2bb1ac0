"""One step of sign-gradient ascent in the L_inf ball (Madry et al. 2018), in place."""

from __future__ import annotations

from torch import Tensor

from vlmdefend.types import per_image

Scale = float | Tensor  # a number, or one per image (B,)


def linf_step_(adversarial: Tensor, gradient: Tensor, origin: Tensor, alpha: Scale, eps: Scale) -> Tensor:
    """``adversarial <- clamp01(origin + clamp(adversarial + alpha sign(gradient) - origin, -eps, eps))``.

    The order of operations is torchattacks' and foolbox's, so that the iterates are equal to theirs bit for bit.
    sign(0) and sign(NaN) are 0: such a pixel stays. ``gradient`` is overwritten.

    Args:
        adversarial: (B, ...) float32 iterate, changed in place and returned.
        gradient: (B, ...) gradient of the loss to be raised.
        origin: (B, ...) clean images.
        alpha: step size; eps: radius; in pixel units, numbers or (B,).
    """
    step = gradient.sign_()
    if isinstance(alpha, Tensor):
        step.mul_(per_image(alpha, step))
        adversarial.add_(step)
    else:
        adversarial.add_(step, alpha=alpha)
    adversarial.sub_(origin)
    if isinstance(eps, Tensor):
        bound = per_image(eps, adversarial)
        adversarial.clamp_(min=-bound, max=bound)
    else:
        adversarial.clamp_(-eps, eps)
    return adversarial.add_(origin).clamp_(0.0, 1.0)
