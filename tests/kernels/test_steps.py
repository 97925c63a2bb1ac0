"""The in-place steps equal their formulas, and survive zero and broken gradients."""

from __future__ import annotations

import pytest
import torch

from vlmdefend.kernels.apgd import apgd_linf_step_
from vlmdefend.kernels.l2 import l2_step_
from vlmdefend.kernels.linf import linf_step_
from vlmdefend.kernels.momentum import momentum_linf_step_
from vlmdefend.kernels.start import noisy
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


@pytest.mark.parametrize("per_image", [False, True])
def test_a_bfloat16_gradient_moves_images_by_float32_steps(per_image: bool) -> None:
    """0.03 has no bfloat16: a step rounded to it would be 0.0300293."""
    origin, adversarial, gradient = tensors((3, 3, 5, 7), 0)
    alpha, eps = (torch.full((3,), v) if per_image else v for v in (0.03, 0.05))
    expected = linf_step_(adversarial.clone(), gradient.bfloat16().float(), origin, alpha, eps)
    assert torch.equal(linf_step_(adversarial.clone(), gradient.bfloat16(), origin, alpha, eps), expected)
    expected = l2_step_(adversarial.clone(), gradient.bfloat16().float(), origin, alpha, eps)
    assert torch.equal(l2_step_(adversarial.clone(), gradient.bfloat16(), origin, alpha, eps), expected)


def test_momentum_step_by_hand() -> None:
    origin = torch.full((2, 4), 0.5)
    x, momentum = origin.clone(), torch.tensor([[1.0, -1.0, 0.0, 0.2], [1.0, 1.0, -1.0, 0.0]])
    gradient = torch.tensor([[-2.0, 2.0, 0.0, -4.0], [0.0, 0.0, 0.0, 0.0]])  # mean |g| is 2, and 0
    momentum_linf_step_(x, gradient, momentum, origin, 0.1, 0.2, 0.5)
    assert torch.allclose(momentum, torch.tensor([[-0.5, 0.5, 0.0, -1.9], [0.5, 0.5, -0.5, 0.0]]))
    assert torch.allclose(x, torch.tensor([[0.4, 0.6, 0.5, 0.4], [0.6, 0.6, 0.4, 0.5]]))


@pytest.mark.parametrize("broken", [0.0, float("nan"), float("inf")])
def test_momentum_lives_through_a_gradient_that_cannot_be_used(broken: float) -> None:
    origin, x, _ = tensors((2, 6), 3)
    momentum = torch.ones_like(origin)
    gradient = torch.ones_like(origin)
    gradient[0] = 0.0
    gradient[0, 0] = broken
    momentum_linf_step_(x, gradient, momentum, origin, 0.1, 0.2, 0.5)
    assert torch.equal(momentum[0], torch.full((6,), 0.5))
    assert torch.equal(momentum[1], torch.full((6,), 1.5))


def test_apgd_step_by_hand() -> None:
    origin = torch.tensor([[0.5, 0.5, 0.02, 0.5]])
    x, before = torch.tensor([[0.5, 0.55, 0.02, 0.5]]), torch.tensor([[0.5, 0.5, 0.02, 0.6]])
    gradient = torch.tensor([[1.0, 1.0, -3.0, float("nan")]])
    found = apgd_linf_step_(before, x, gradient, origin, torch.tensor([0.08]), torch.tensor([0.75]), 0.1)
    # z: 0.58, 0.6 (cut from 0.63), 0 (cut from -0.06), 0.5
    expected = [0.5 + 0.75 * 0.08, 0.55 + 0.75 * 0.05 + 0.25 * 0.05, 0.02 - 0.75 * 0.02, 0.5 - 0.25 * 0.1]
    assert found is before
    assert torch.allclose(found, torch.tensor([expected]))
    assert torch.equal(x, torch.tensor([[0.5, 0.55, 0.02, 0.5]]))


def test_a_start_is_noise_scaled_and_clamped() -> None:
    origin = torch.tensor([[0.5, 0.99], [0.5, 0.01]])
    noise = torch.tensor([[-1.0, 1.0], [0.5, -1.0]])
    assert torch.equal(noisy(origin, noise, 0.1), (origin + 0.1 * noise).clamp(0, 1))
    assert torch.allclose(noisy(origin, noise, torch.tensor([0.1, 0.2])), torch.tensor([[0.4, 1.0], [0.6, 0.0]]))
