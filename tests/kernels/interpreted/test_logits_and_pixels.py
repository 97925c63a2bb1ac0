"""The fused losses, normalisation and resize equal their specification in torch, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels.conftest import LAYOUTS, SHAPES
from tests.kernels.test_margin import lowest_class_first, margin_and_gradient
from vlmdefend.kernels import margin, normalize, resize, resize_weights
from vlmdefend.kernels.dispatch import uses_triton


@pytest.fixture(autouse=True)
def on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLMDEFEND_KERNELS", "triton")
    assert uses_triton(torch.zeros(1))


def logits(classes: int, tied: bool) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(classes)
    z = torch.randn(24, classes, generator=generator) * 5
    return z.round() if tied else z, torch.randint(0, classes, (24,), generator=generator)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("classes", [2, 3, 5, 100, 1000])
def test_margin_and_its_gradient_are_equal_to_the_bit(classes: int, tied: bool) -> None:
    z, labels = logits(classes, tied)
    value, gradient = margin_and_gradient(margin.margin, z, labels)
    expected, expected_gradient = margin_and_gradient(margin.reference_margin, z, labels)
    assert torch.equal(value, expected)
    assert torch.equal(gradient, expected_gradient)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("classes", [3, 5, 100, 1000])
def test_dlr_and_its_gradient_are_equal_to_the_bit(classes: int, tied: bool) -> None:
    """Of equal logits the lowest class gives the gradient, where torch.topk leaves it open."""
    z, labels = logits(classes, tied)
    value, gradient = margin_and_gradient(margin.dlr, z, labels)
    reference = lowest_class_first if tied else margin.reference_dlr
    expected, expected_gradient = margin_and_gradient(reference, z, labels)
    assert torch.equal(value, margin.reference_dlr(z, labels))
    assert torch.equal(value, expected)
    assert torch.equal(gradient, expected_gradient)


@pytest.mark.parametrize("function", [margin.margin, margin.dlr])
def test_bfloat16_logits_are_computed_in_float32(function: object) -> None:
    """The gradient is stored in bfloat16; the interpreter cuts what a GPU rounds, one unit in its last place."""
    z, labels = logits(100, tied=False)
    value, gradient = margin_and_gradient(function, z.bfloat16(), labels)  # type: ignore[arg-type]
    expected, exact = margin_and_gradient(function, z.bfloat16().float(), labels)  # type: ignore[arg-type]
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)
    assert gradient.dtype == torch.bfloat16
    assert torch.allclose(gradient.float(), exact, rtol=2**-7, atol=0.0)


@pytest.mark.parametrize("function", [margin.margin, margin.dlr])
def test_a_logit_that_is_not_a_number_makes_the_loss_not_a_number(function: object) -> None:
    z, labels = logits(5, tied=False)
    z[3, (labels[3] + 1) % 5] = float("nan")
    value = function(z, labels)  # type: ignore[operator]
    assert value.isnan().nonzero().tolist() == [[3]]


MEAN, STD = torch.tensor([0.48, 0.46, 0.41]).view(3, 1, 1), torch.tensor([0.27, 0.26, 0.28]).view(3, 1, 1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_normalisation_and_its_gradient_are_equal_to_the_bit(shape: tuple[int, ...], layout: str) -> None:
    images = LAYOUTS[layout](torch.rand(shape, generator=torch.Generator().manual_seed(0)))
    mean, std = MEAN[: shape[1]], STD[: shape[1]]
    results = []
    for function in (normalize.normalized, normalize.reference):
        pixels = images.detach().requires_grad_(True)
        found = function(pixels, mean, std)
        results.append((found, torch.autograd.grad(found, pixels, torch.full_like(found, 0.7))[0]))
    (found, gradient), (expected, expected_gradient) = results
    assert torch.equal(found, expected)
    assert torch.equal(gradient, expected_gradient)


@pytest.mark.parametrize(
    ("height", "width", "side", "layout"),
    [
        *((7, 10, 9, layout) for layout in LAYOUTS),  # one axis is enlarged, the other shrunk
        (4, 4, 13, "contiguous"),
        (17, 13, 5, "contiguous"),
        (8, 5, 8, "contiguous"),
    ],
)
def test_resize_with_normalisation_is_equal_but_for_the_order_of_sums(
    height: int, width: int, side: int, layout: str
) -> None:
    def axis(size: int) -> resize_weights.AxisResize:
        rows = torch.eye(size).view(1, 1, size, size)
        return resize_weights.AxisResize.of(
            F.interpolate(rows, (side, size), mode="bicubic", antialias=side < size)[0, 0]
        )

    generator = torch.Generator().manual_seed(0)
    images = LAYOUTS[layout](torch.rand(2, 3, height, width, generator=generator))
    rows, columns = axis(height), axis(width)
    pixels, again = images.detach().requires_grad_(True), images.detach().requires_grad_(True)
    found = resize.resized_normalized(pixels, rows, columns, MEAN, STD)
    expected = normalize.reference(resize.resized(again, rows.matrix, columns.matrix), MEAN, STD)
    # values of at most 1 times weights whose absolutes sum to 2 at most, over std 0.26: eight units in the last place
    torch.testing.assert_close(found, expected, rtol=0.0, atol=8 * 2**-23 * 2 / 0.26)
    upstream = torch.randn(found.shape, generator=generator)
    (gradient,) = torch.autograd.grad(found, pixels, upstream)
    (expected_gradient,) = torch.autograd.grad(expected, again, upstream)
    torch.testing.assert_close(
        gradient, expected_gradient, rtol=0.0, atol=8 * 2**-23 * float(expected_gradient.abs().max())
    )
