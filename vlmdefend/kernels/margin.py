"""The losses on the logits that attacks raise, margin and DLR, with their gradient on the logits from the same pass.

Where logits are equal, the highest other logit shares its gradient evenly among all that are tied (as torch's amax
does). The first and third logit of DLR take theirs from single places: torch.topk leaves open which of several equal
logits it means, the fused kernel means the one of lowest class.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmdefend.kernels.dispatch import through_op, uses_triton
from vlmdefend.kernels.operators import operator


def margin(logits: Tensor, classes: Tensor) -> Tensor:
    """Returns (B,) float32 margins of (B, C) logits and (B,) classes y: ``max_{i != y} z_i - z_y``, float32.

    Carlini & Wagner 2017, f_6 without the floor.
    """
    if through_op(logits):
        value: Tensor = _operator(logits, classes, False)[0]
        return value
    return reference_margin(logits, classes)


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns (B,) DLR losses of (B, C >= 3) logits and labels y: ``-(z_y - max_{i != y} z_i) / (z_1 - z_3 + 1e-12)``.

    z_1 and z_3 are the highest and third highest logit (Croce & Hein 2020, eq. 6). Types as of :func:`margin`.
    """
    if through_op(logits):
        value: Tensor = _operator(logits, labels, True)[0]
        return value
    return reference_dlr(logits, labels)


def reference_margin(logits: Tensor, classes: Tensor) -> Tensor:
    """The margin in torch: the specification."""
    z = wide(logits)
    return _best_other(z, classes) - z.gather(1, classes[:, None])[:, 0]


def reference_dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """DLR in torch: the specification."""
    z = wide(logits)
    top = z.topk(3, dim=1).values
    label = z.gather(1, labels[:, None])[:, 0]
    return -(label - _best_other(z, labels)) / (top[:, 0] - top[:, 2] + 1e-12)


def wide(values: Tensor) -> Tensor:
    """Half precision as float32; float32 and float64 as they are."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


def _best_other(logits: Tensor, classes: Tensor) -> Tensor:
    """Masked with -inf: a product mask fails on negative logits."""
    return logits.scatter(1, classes[:, None], -torch.inf).amax(dim=1)


def _body(logits: Tensor, classes: Tensor, ratio: bool) -> tuple[Tensor, Tensor]:
    """The loss and its gradient on the logits."""
    if uses_triton(logits):
        from vlmdefend.kernels.fused.margin import loss_and_gradient as fused

        return fused(logits, classes, ratio)
    value = (reference_dlr if ratio else reference_margin)(logits, classes)
    return value, _gradient(wide(logits), classes, value if ratio else None).to(logits.dtype)


def _gradient(z: Tensor, classes: Tensor, ratio: Tensor | None) -> Tensor:
    """What autograd finds of the two references, written out; ``ratio``: the DLR of which it is the gradient."""
    others = z.scatter(1, classes[:, None], -torch.inf)
    tied = others == others.amax(dim=1, keepdim=True)
    top = z.topk(3, dim=1) if ratio is not None else None
    spread = torch.ones_like(z[:, :1]) if top is None else top.values[:, :1] - top.values[:, 2:] + 1e-12
    gradient = tied / spread / tied.sum(dim=1, keepdim=True)
    gradient.scatter_(1, classes[:, None], -1.0 / spread)
    if top is not None and ratio is not None:
        slope = ratio[:, None] / spread
        gradient.scatter_add_(1, top.indices[:, ::2], torch.cat([-slope, slope], dim=1))
    return gradient


def _fake(logits: Tensor, classes: Tensor, ratio: bool) -> tuple[Tensor, Tensor]:
    return wide(logits).new_empty(logits.shape[0]), torch.empty_like(logits)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])  # first order only
    ctx.save_for_backward(output[1])


def _backward(ctx: Any, value: Tensor, gradient: Tensor) -> tuple[Tensor, None, None]:
    (unit,) = ctx.saved_tensors
    return (value[:, None] * unit).to(unit.dtype), None, None


_operator = operator(
    "logit_loss(Tensor logits, Tensor classes, bool ratio) -> (Tensor, Tensor)",
    _body,
    _fake,
)
_operator.register_autograd(_backward, setup_context=_keep)
