"""The in-place steps equal their formulas, and survive zero and broken gradients."""

from __future__ import annotations

import pytest
import torch

from vlmdefend.kernels.l2 import l2_step_
from vlmdefend.kernels.linf import linf_step_
from vlmdefend.types import Threat


def tensors(shape: tuple[int, ...], seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    origin = torch.rand(shape, generator=generator)
    adversarial = (origin + 0.05 * torch.randn(shape, generator=generator)).clamp(0, 1)
    return origin, adversarial, torch.randn(shape, generator=generator)


@pytest.mark.parametrize("shape", [(1, 8), (3, 3, 5, 7), (4, 3, 32, 32)])
@pytest.mark.parametrize("per_image", [False, True])
def test_linf_step_equals_the_formula_to_the_bit(shape: tuple[int, ...], per_image: bool) -> None:
    origin, adversarial, gradient = tensors(shape, 0)
    gradient.view(-1)[::5] = 0
    alpha, eps = 0.03, 0.05
    moved = adversarial + alpha * gradient.sign()
    expected = torch.clamp(origin + torch.clamp(moved - origin, -eps, eps), 0, 1)
    scale = [torch.full(shape[:1], v) for v in (alpha, eps)] if per_image else [alpha, eps]
    found = linf_step_(adversarial, gradient.clone(), origin, *scale)
    assert found is adversarial
    assert torch.equal(found, expected)


def test_a_pixel_without_a_usable_gradient_stays() -> None:
    origin = torch.full((1, 4), 0.5)
    gradient = torch.tensor([[0.0, float("nan"), 1.0, -1.0]])
    found = linf_step_(origin.clone(), gradient, origin, 0.1, 0.2)
    assert torch.allclose(found, torch.tensor([[0.5, 0.5, 0.6, 0.4]]))


@pytest.mark.parametrize("shape", [(1, 8), (3, 3, 5, 7), (4, 3, 32, 32)])
@pytest.mark.parametrize("per_image", [False, True])
def test_l2_step_equals_the_formula(shape: tuple[int, ...], per_image: bool) -> None:
    origin, adversarial, gradient = tensors(shape, 1)
    alpha, eps = 0.3, 0.5
    flat = gradient.flatten(1)
    moved = adversarial + alpha * (flat / flat.norm(dim=1, keepdim=True)).view(shape)
    expected = Threat("l2", eps).project(moved, origin)
    scale = [torch.full(shape[:1], v) for v in (alpha, eps)] if per_image else [alpha, eps]
    found = l2_step_(adversarial, gradient.clone(), origin, *scale)
    assert found is adversarial
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("broken", [0.0, float("nan"), float("inf")])
def test_l2_image_without_a_usable_gradient_stays_and_its_mates_move(broken: float) -> None:
    origin = torch.full((2, 6), 0.5)
    gradient = torch.ones(2, 6)
    gradient[0] = broken
    found = l2_step_(origin.clone(), gradient, origin, 0.1, 0.2)
    assert torch.equal(found[0], origin[0])
    assert (found[1] - origin[1]).norm().item() == pytest.approx(0.1, rel=1e-5)


def test_radius_zero_is_the_origin() -> None:
    origin, adversarial, gradient = tensors((2, 3, 4, 4), 2)
    assert torch.equal(linf_step_(adversarial.clone(), gradient.clone(), origin, 0.1, 0.0), origin)
    assert torch.equal(l2_step_(adversarial.clone(), gradient.clone(), origin, 0.1, 0.0), origin)
