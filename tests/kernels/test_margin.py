"""Margin and DLR: their closed-form gradients are autograd's, ties and few classes included."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vlmdefend.attacks.criterion import Criterion
from vlmdefend.attacks.losses import LOSSES
from vlmdefend.kernels import margin
from vlmdefend.types import Outputs

Formula = Callable[[Tensor, Tensor], Tensor]


def margin_and_gradient(formula: Formula, z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and the gradient of its sum on the logits."""
    leaf = z.detach().clone().requires_grad_(True)
    value = formula(leaf, labels)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


def lowest_class_first(z: Tensor, labels: Tensor) -> Tensor:
    """DLR by a stable sort: of equal logits the lowest class comes first."""
    top = z.sort(dim=1, descending=True, stable=True).values
    label = z.gather(1, labels[:, None])[:, 0]
    other = z.scatter(1, labels[:, None], -torch.inf).amax(dim=1)
    return -(label - other) / (top[:, 0] - top[:, 2] + 1e-12)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("classes", [2, 3, 5, 1000])
def test_the_operator_gives_autograds_gradient_to_the_bit(classes: int, tied: bool) -> None:
    generator = torch.Generator().manual_seed(classes)
    z = torch.randn(32, classes, generator=generator) * 5
    z = z.round() if tied else z
    labels = torch.randint(0, classes, (32,), generator=generator)
    for ratio, formula in ((False, margin.reference_margin), (True, margin.reference_dlr)):
        if ratio and classes < 3:
            continue
        value, gradient = margin_and_gradient(formula, z, labels)
        found = margin_and_gradient(lambda x, y, r=ratio: torch.ops.vlmdefend.logit_loss(x, y, r)[0], z, labels)
        assert torch.equal(found[0], value)
        assert torch.equal(found[1], gradient)


def test_gradients_by_hand() -> None:
    z = torch.tensor([[3.0, 1.0, 2.0, 2.0]])
    value, gradient = margin_and_gradient(margin.margin, z, torch.tensor([0]))
    assert value.item() == -1.0
    assert gradient.tolist() == [[-1.0, 0.0, 0.5, 0.5]]  # the two best others share
    z = torch.tensor([[3.0, 1.0, 2.0, 0.0]])
    value, gradient = margin_and_gradient(margin.dlr, z, torch.tensor([0]))
    assert value.item() == -0.5  # -(3 - 2) / (3 - 1)
    # d/dz_y: -1/2 + 1/4, best other: 1/2, third: -1/4
    assert gradient.tolist() == [[-0.25, -0.25, 0.5, 0.0]]


@pytest.mark.parametrize("targeted", [False, True])
def test_losses_on_bfloat16_logits_are_those_of_their_float32_values(targeted: bool) -> None:
    z = torch.randn(16, 10, generator=torch.Generator().manual_seed(0)).mul(20).bfloat16()
    labels = torch.arange(16) % 10
    criterion = Criterion(labels, (labels + 3) % 10 if targeted else None)
    for name in ("cw", "cw50", "dlr"):
        assert torch.equal(LOSSES[name](Outputs(z), criterion), LOSSES[name](Outputs(z.float()), criterion))
