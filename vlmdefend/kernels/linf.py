"""One step of sign-gradient ascent in the L_inf ball (Madry et al. 2018), in place."""

from __future__ import annotations

from torch import Tensor

from vlmdefend.kernels.dispatch import through_op, uses_triton
from vlmdefend.kernels.operators import Scale, joined, operator, split
from vlmdefend.kernels.shape import per_image


def linf_step_(adversarial: Tensor, gradient: Tensor, origin: Tensor, alpha: Scale, eps: Scale) -> Tensor:
    """``adversarial <- clamp01(origin + clamp(adversarial + alpha sign(gradient) - origin, -eps, eps))``.

    The order of operations is torchattacks' and foolbox's, so that the iterates are equal to theirs bit for bit.
    sign(0) and sign(NaN) are 0: such a pixel stays. What is in ``gradient`` afterwards is undefined.

    Args:
        adversarial: (B, ...) float32 iterate, changed in place and returned.
        gradient: (B, ...) gradient of the loss to be raised, float32 or bfloat16.
        origin: (B, ...) clean images.
        alpha: step size; eps: radius; in pixel units, numbers or (B,).
    """
    if through_op(adversarial):
        _operator(adversarial, gradient, origin, *split(alpha), *split(eps))
        return adversarial
    return reference_(adversarial, gradient, origin, alpha, eps)


def reference_(adversarial: Tensor, gradient: Tensor, origin: Tensor, alpha: Scale, eps: Scale) -> Tensor:
    """The step in torch: the specification."""
    step = gradient.sign_().to(adversarial.dtype)  # a (B,) alpha would be rounded to the gradient's precision
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
        from vlmdefend.kernels.fused.linf import linf_step_ as fused_

        fused_(adversarial, gradient, origin, *scales)
    else:
        reference_(adversarial, gradient, origin, *scales)


_operator = operator(
    "linf_step_(Tensor(a!) adversarial, Tensor(b!) gradient, Tensor origin, "
    "float alpha, Tensor? alpha_each, float eps, Tensor? eps_each) -> ()",
    _body,
    lambda *arguments: None,
)
