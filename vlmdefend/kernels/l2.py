"""One step of normalised gradient ascent in the L2 ball, in place."""

from __future__ import annotations

from torch import Tensor

from vlmdefend.kernels.linf import Scale
from vlmdefend.types import per_image


def l2_step_(adversarial: Tensor, gradient: Tensor, origin: Tensor, alpha: Scale, eps: Scale) -> Tensor:
    """``d = adversarial + alpha g / ||g||_2 - origin;  adversarial <- clamp01(origin + d min(1, eps / ||d||_2))``.

    An image whose gradient is zero or not finite stays where it is. ``gradient`` is overwritten. Arguments as in
    :func:`vlmdefend.kernels.linf.linf_step_`.
    """
    length = gradient.flatten(1).norm(dim=1)
    usable = length.isfinite() & (length > 0)
    scale = (alpha / length.clamp_min(1e-12)).where(usable, 0.0)
    gradient.nan_to_num_(0.0, 0.0, 0.0).mul_(per_image(scale, gradient))
    adversarial.add_(gradient).sub_(origin)
    shrink = (eps / adversarial.flatten(1).norm(dim=1).clamp_min(1e-12)).clamp_max(1.0)
    return adversarial.mul_(per_image(shrink, adversarial)).add_(origin).clamp_(0.0, 1.0)
