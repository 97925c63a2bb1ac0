"""The fused steps equal their specification in torch, in Triton's interpreter on the CPU.

The elementwise steps equal it bit for bit. Where a step sums over an image the order of the sum differs, which moves
the sum by a few units in the last place; what is computed from equal sums is equal.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.conftest import LAYOUTS, SHAPES, images_around, scales
from vlmdefend.kernels import apgd, l2, linf, momentum, start
from vlmdefend.kernels.dispatch import uses_triton
from vlmdefend.types import Threat

ULP = torch.finfo(torch.float32).eps
ODD = (3, 3, 17, 19)
CASES = pytest.mark.parametrize(
    ("shape", "each", "layout", "stored"),
    [
        *((shape, each, "contiguous", torch.float32) for shape in [*SHAPES, (2, 3, 64, 50)] for each in (False, True)),
        *((ODD, True, layout, torch.float32) for layout in LAYOUTS if layout != "contiguous"),
        (ODD, False, "contiguous", torch.bfloat16),
        (ODD, True, "strided", torch.bfloat16),
    ],
)


@pytest.fixture(autouse=True)
def on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLMDEFEND_KERNELS", "triton")
    assert uses_triton(torch.zeros(1))


def same(found: Tensor, expected: Tensor) -> bool:
    """Equal bits, the sign of zero aside; what is not a number equals itself."""
    return torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0)) and torch.equal(found.isnan(), expected.isnan())


@CASES
def test_linf_step_is_equal_to_the_bit(shape: tuple[int, ...], each: bool, layout: str, stored: torch.dtype) -> None:
    origin, near, gradient = (LAYOUTS[layout](t) for t in images_around(shape))
    gradient = gradient.to(stored)
    alpha, eps = scales(each, len(origin), 0.03, 0.05)
    expected = linf.reference_(near.clone(), gradient.clone(), origin, alpha, eps)
    found = linf.linf_step_(near, gradient, origin, alpha, eps)
    assert found is near
    assert same(found, expected)


@CASES
def test_apgd_step_is_equal_to_the_bit(shape: tuple[int, ...], each: bool, layout: str, stored: torch.dtype) -> None:
    origin, near, gradient = (LAYOUTS[layout](t) for t in images_around(shape))
    before = LAYOUTS[layout](images_around(shape, seed=1)[1])
    size = torch.linspace(0.02, 0.2, len(origin))
    weight = torch.tensor([0.75, 1.0, 0.75])[: len(origin)]
    (eps,) = scales(each, len(origin), 0.1)
    gradient = gradient.to(stored)
    expected = apgd.reference_(before.clone(), near, gradient.clone(), origin, size, weight, eps)
    found = apgd.apgd_linf_step_(before, near, gradient, origin, size, weight, eps)
    assert found is before
    assert same(found, expected)


@pytest.mark.parametrize(
    ("shape", "layout"), [*((shape, "contiguous") for shape in SHAPES), *((ODD, layout) for layout in LAYOUTS)]
)
@pytest.mark.parametrize("each", [False, True])
def test_random_start_is_equal_to_the_bit(shape: tuple[int, ...], layout: str, each: bool) -> None:
    origin, _, noise = images_around(shape)
    origin = LAYOUTS[layout](origin)
    (eps,) = scales(each, len(origin), 0.1)
    assert same(start.noisy(origin, noise, eps), start.reference(origin, noise, eps))


@CASES
def test_momentum_step_is_equal_but_for_the_order_of_a_sum(
    shape: tuple[int, ...], each: bool, layout: str, stored: torch.dtype
) -> None:
    origin, near, gradient = images_around(shape)
    gradient[:-1] = gradient[:-1].nan_to_num(0.5, 0.5, 0.5)  # the last image keeps its broken gradient
    generator = torch.Generator().manual_seed(3)
    speed = torch.randn(shape, generator=generator)
    origin, near, gradient, speed = (LAYOUTS[layout](t) for t in (origin, near, gradient.to(stored), speed))
    alpha, eps = scales(each, len(origin), 0.03, 0.05)
    expected = speed.clone()
    momentum.reference_(near.clone(), gradient.clone(), expected, origin, alpha, eps, 0.9)
    before = near.clone()
    found = momentum.momentum_linf_step_(near, gradient, speed, origin, alpha, eps, 0.9)
    assert found is near
    size = (expected - 0.9 * speed).abs() + expected.abs()
    assert ((speed - expected).abs() <= 8 * ULP * (size + 10.0)).all()
    # the step is the L_inf step along the momentum, bit for bit
    assert same(near, linf.reference_(before, speed.clone(), origin, alpha, eps))


@pytest.mark.parametrize("broken", [0.0, float("nan"), float("inf")])
def test_a_gradient_that_cannot_be_used_only_projects_its_image(broken: float) -> None:
    origin, near, gradient = images_around((2, 3, 8, 8))
    gradient = gradient.nan_to_num(0.5, 0.5, 0.5)
    gradient[1] = 0.0
    gradient[1, 0, 0, 0] = broken
    speed = torch.ones_like(origin)
    momentum.momentum_linf_step_(near.clone(), gradient, speed, origin, 0.01, 0.05, 0.5)
    assert torch.equal(speed[1], torch.full_like(speed[1], 0.5))
    assert not torch.equal(speed[0], torch.full_like(speed[0], 0.5))
    for radius in (0.1, 10.0):  # near lies outside the first ball, inside the second
        expected = Threat("l2", radius).project(near, origin)
        found = l2.l2_step_(near.clone(), gradient, origin, 0.1, radius)
        assert torch.allclose(found[1], expected[1], rtol=0.0, atol=2 * ULP)
        assert not torch.allclose(found[0], expected[0], rtol=0.0, atol=2 * ULP)


@CASES
def test_l2_step_is_equal_but_for_the_order_of_the_sums(
    shape: tuple[int, ...], each: bool, layout: str, stored: torch.dtype
) -> None:
    origin, near, gradient = images_around(shape)
    gradient[:-1] = gradient[:-1].nan_to_num(0.5, 0.5, 0.5)
    origin, near, gradient = (LAYOUTS[layout](t) for t in (origin, near, gradient.to(stored)))
    alpha, eps = scales(each, len(origin), 0.3, 0.4)
    expected = l2.reference_(near.clone(), gradient.clone(), origin, alpha, eps)
    found = l2.l2_step_(near, gradient, origin, alpha, eps)
    assert found is near
    # both lengths err by units in their last place, and a distance of at most 0.4 with them; adding the origin back
    # rounds to half a unit of 1
    assert torch.allclose(found, expected, rtol=0.0, atol=2 * ULP)
    radius = torch.as_tensor(eps).expand(len(origin))
    assert ((found - origin).double().flatten(1).norm(dim=1) <= radius + 1e-6).all()


def test_radius_zero_is_the_origin() -> None:
    origin, near, gradient = images_around((2, 3, 8, 8))
    ones = torch.ones(2)
    for moved in (
        linf.linf_step_(near.clone(), gradient.clone(), origin, 0.1, 0.0),
        l2.l2_step_(near.clone(), gradient.nan_to_num(0, 0, 0), origin, 0.1, 0.0),
        momentum.momentum_linf_step_(near.clone(), gradient.clone(), torch.zeros_like(near), origin, 0.1, 0.0, 1.0),
        apgd.apgd_linf_step_(near.clone(), near, gradient.clone(), origin, ones * 0.1, ones, 0.0),
        start.noisy(origin, near, 0.0),
    ):
        assert torch.equal(moved, origin)


def test_an_empty_batch_stays_empty() -> None:
    none = torch.empty(0, 3, 4, 4)
    assert linf.linf_step_(none, none, none, 0.1, 0.1).shape == none.shape
    assert l2.l2_step_(none, none, none, 0.1, 0.1).shape == none.shape
    assert momentum.momentum_linf_step_(none, none, none, none, 0.1, 0.1, 1.0).shape == none.shape
    assert apgd.apgd_linf_step_(none, none, none, none, torch.empty(0), torch.empty(0), 0.1).shape == none.shape
    assert start.noisy(none, none, 0.1).shape == none.shape


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(1, 40), min_size=2, max_size=4).map(tuple),
    alpha=st.floats(0.0, 1.0, width=32),
    eps=st.floats(0.0, 1.0, width=32),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_any_step_is_equal_to_the_bit(
    shape: tuple[int, ...], alpha: float, eps: float, seed: int
) -> None:
    origin, near, gradient = images_around((min(shape[0], 3), *shape[1:3], *(min(n, 8) for n in shape[3:])), seed)
    expected = linf.reference_(near.clone(), gradient.clone(), origin, alpha, eps)
    assert same(linf.linf_step_(near.clone(), gradient, origin, alpha, eps), expected)
    sizes, weights = torch.full((len(origin),), alpha), torch.full((len(origin),), 0.75)
    expected = apgd.reference_(origin.clone(), near, gradient.clone(), origin, sizes, weights, eps)
    assert same(apgd.apgd_linf_step_(origin.clone(), near, gradient, origin, sizes, weights, eps), expected)
