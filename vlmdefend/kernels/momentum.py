"""One step of sign-gradient ascent with momentum in the L_inf ball (MI-FGSM, Dong et al. 2018), in place."""

from __future__ import annotations

from torch import Tensor

from vlmdefend.kernels import linf
from vlmdefend.kernels.dispatch import through_op, uses_triton
from vlmdefend.kernels.operators import Scale, joined, operator, split
from vlmdefend.kernels.shape import per_image


def momentum_linf_step_(
    adversarial: Tensor,
    gradient: Tensor,
    momentum: Tensor,
    origin: Tensor,
    alpha: Scale,
    eps: Scale,
    decay: float,
) -> Tensor:
    """``momentum <- g / mean|g| + decay momentum``, then the L_inf step along its sign (eq. 6 and 7 of the paper).

    The paper divides by the sum; the mean has the same sign path and is what the published code does. ``adversarial``
    (returned) and ``momentum`` (float32) are changed in place; what is in ``gradient`` afterwards is undefined.
    Arguments as in :func:`vlmdefend.kernels.linf.linf_step_`.
    """
    if through_op(adversarial):
        _operator(adversarial, gradient, momentum, origin, *split(alpha), *split(eps), decay)
        return adversarial
    return reference_(adversarial, gradient, momentum, origin, alpha, eps, decay)


def reference_(
    adversarial: Tensor,
    gradient: Tensor,
    momentum: Tensor,
    origin: Tensor,
    alpha: Scale,
    eps: Scale,
    decay: float,
) -> Tensor:
    """The step in torch: the specification."""
    gradient = gradient.to(momentum.dtype)
    accumulate_(momentum, gradient, decay)
    return linf.reference_(adversarial, gradient.copy_(momentum), origin, alpha, eps)


def accumulate_(momentum: Tensor, gradient: Tensor, decay: float) -> Tensor:
    """``momentum <- g / mean|g| + decay momentum``; a gradient that is zero or not finite adds nothing.

    Unguarded, one such gradient leaves 0/0 in the momentum for good, and the attack stands still. ``gradient`` is
    overwritten.
    """
    size = gradient.abs().flatten(1).mean(dim=1)
    usable = size.isfinite() & (size > 0)
    gradient.div_(per_image(size.where(usable, 1.0), gradient))
    gradient.masked_fill_(per_image(~usable, gradient), 0.0)
    return momentum.mul_(decay).add_(gradient)


def _body(
    adversarial: Tensor,
    gradient: Tensor,
    momentum: Tensor,
    origin: Tensor,
    alpha: float,
    alpha_each: Tensor | None,
    eps: float,
    eps_each: Tensor | None,
    decay: float,
) -> None:
    scales = joined(alpha, alpha_each), joined(eps, eps_each)
    if uses_triton(adversarial):
        from vlmdefend.kernels.fused.momentum import momentum_linf_step_ as fused_

        fused_(adversarial, gradient, momentum, origin, *scales, decay)
    else:
        reference_(adversarial, gradient, momentum, origin, *scales, decay)


_operator = operator(
    "momentum_linf_step_(Tensor(a!) adversarial, Tensor(b!) gradient, Tensor(c!) momentum, Tensor origin, "
    "float alpha, Tensor? alpha_each, float eps, Tensor? eps_each, float decay) -> ()",
    _body,
    lambda *arguments: None,
)
