"""One step of normalised gradient ascent in the L2 ball, in place."""

from __future__ import annotations

from torch import Tensor

from vlmdefend.kernels.dispatch import through_op, uses_triton
from vlmdefend.kernels.operators import Scale, joined, operator, split
from vlmdefend.kernels.shape import per_image


def l2_step_(adversarial: Tensor, gradient: Tensor, origin: Tensor, alpha: Scale, eps: Scale) -> Tensor:
    """``d = adversarial + alpha g / ||g||_2 - origin;  adversarial <- clamp01(origin + d min(1, eps / ||d||_2))``.

    An image whose gradient is zero or not finite stays where it is. What is in ``gradient`` afterwards is undefined.
    Arguments as in :func:`vlmdefend.kernels.linf.linf_step_`.
    """
    if through_op(adversarial):
        _operator(adversarial, gradient, origin, *split(alpha), *split(eps))
        return adversarial
    return reference_(adversarial, gradient, origin, alpha, eps)


def reference_(adversarial: Tensor, gradient: Tensor, origin: Tensor, alpha: Scale, eps: Scale) -> Tensor:
    """The step in torch: the specification."""
    gradient = gradient.to(adversarial.dtype)
    length = gradient.flatten(1).norm(dim=1)
    usable = length.isfinite() & (length > 0)
    scale = (alpha / length.clamp_min(1e-12)).where(usable, 0.0)
    gradient.nan_to_num_(0.0, 0.0, 0.0).mul_(per_image(scale, gradient))
    adversarial.add_(gradient).sub_(origin)
    shrink = (eps / adversarial.flatten(1).norm(dim=1).clamp_min(1e-12)).clamp_max(1.0)
    return adversarial.mul_(per_image(shrink, adversarial)).add_(origin).clamp_(0.0, 1.0)


def _body(
    adversarial: Tensor,
    gradient: Tensor,
    origin: Tensor,
    alpha: float,
    alpha_each: Tensor | None,
    eps: float,
    eps_each: Tensor | None,
) -> None:
    scales = joined(alpha, alpha_each), joined(eps, eps_each)
    if uses_triton(adversarial):
        from vlmdefend.kernels.fused.l2 import l2_step_ as fused_

        fused_(adversarial, gradient, origin, *scales)
    else:
        reference_(adversarial, gradient, origin, *scales)


_operator = operator(
    "l2_step_(Tensor(a!) adversarial, Tensor(b!) gradient, Tensor origin, "
    "float alpha, Tensor? alpha_each, float eps, Tensor? eps_each) -> ()",
    _body,
    lambda *arguments: None,
)
