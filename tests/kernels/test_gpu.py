"""On a real GPU the fused kernels equal their specification on the CPU; the elementwise ones to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.attacks.conftest import convolutional, labelled
from tests.kernels.conftest import LAYOUTS, SHAPES, images_around, scales
from tests.kernels.test_margin import lowest_class_first, margin_and_gradient
from vlmdefend.attacks import ATTACKS, cuda_graph
from vlmdefend.attacks.view import Gradient, View
from vlmdefend.kernels import apgd, l2, linf, margin, momentum, normalize, resize, resize_weights, start
from vlmdefend.kernels.dispatch import uses_triton
from vlmdefend.rng import ImageRng
from vlmdefend.types import Threat

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def up(*values: Tensor | float) -> list[Tensor | float]:
    """The same on the GPU, in the same layout."""
    return [value.cuda() if isinstance(value, Tensor) else value for value in values]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, (4, 3, 224, 224)])
def test_steps_equal_the_specification(shape: tuple[int, ...], each: bool, layout: str) -> None:
    origin, near, gradient = (LAYOUTS[layout](t) for t in images_around(shape))
    alpha, eps = scales(each, len(origin), 0.03, 0.05)
    assert uses_triton(near.cuda())
    size, weight = torch.linspace(0.02, 0.2, len(origin)), torch.full((len(origin),), 0.75)
    for step, reference, arguments in (
        (linf.linf_step_, linf.reference_, (near, gradient, origin, alpha, eps)),
        (apgd.apgd_linf_step_, apgd.reference_, (near, origin, gradient, origin, size, weight, eps)),
        (start.noisy, start.reference, (origin, near, eps)),
    ):
        found = step(*up(*arguments))  # type: ignore[operator]
        expected = reference(*(a.clone() if isinstance(a, Tensor) else a for a in arguments))  # type: ignore[operator]
        assert torch.equal(found.cpu(), expected)
    gradient = gradient.nan_to_num(0.5, 0.5, 0.5)
    found = l2.l2_step_(*up(near, gradient, origin, alpha, eps))  # type: ignore[arg-type]
    assert torch.allclose(found.cpu(), l2.reference_(near.clone(), gradient.clone(), origin, alpha, eps), atol=3e-7)
    speed = near.clone().cuda()
    momentum.momentum_linf_step_(*up(near, gradient), speed, *up(origin, alpha, eps), 1.0)  # type: ignore[call-arg, arg-type]
    expected_speed = near.clone()
    momentum.reference_(near.clone(), gradient.clone(), expected_speed, origin, alpha, eps, 1.0)
    assert torch.allclose(speed.cpu(), expected_speed, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("classes", [3, 10, 1000, 21000])
def test_losses_equal_the_specification(classes: int, tied: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(32, classes, generator=generator) * 5
    z = z.round() if tied else z
    labels = torch.randint(0, classes, (32,), generator=generator)
    for function, reference in ((margin.margin, margin.reference_margin), (margin.dlr, lowest_class_first)):
        found, expected = (
            margin_and_gradient(function, z.cuda(), labels.cuda()),
            margin_and_gradient(reference, z, labels),
        )
        assert all(torch.equal(one.cpu(), other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pixels_to_network_input_equal_the_specification(layout: str) -> None:
    images = LAYOUTS[layout](torch.rand(2, 3, 40, 52, generator=torch.Generator().manual_seed(0)))
    mean, std = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    found = normalize.normalized(images.cuda(), mean.cuda(), std.cuda())
    assert torch.equal(found.cpu(), normalize.reference(images, mean, std))

    def axis(size: int) -> Tensor:
        rows = torch.eye(size).view(1, 1, size, size)
        return F.interpolate(rows, (48, size), mode="bicubic", antialias=size > 48)[0, 0]

    results = []
    for device in ("cpu", "cuda"):
        pixels = images.to(device).requires_grad_(True)
        tables = (resize_weights.AxisResize.of(axis(size).to(device)) for size in (40, 52))
        found = resize.resized_normalized(pixels, *tables, mean.to(device), std.to(device))
        results.append((found.detach().cpu(), torch.autograd.grad(found.sum(), pixels)[0].cpu()))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["pgd", "apgd-ce"])
def test_a_captured_run_ends_where_an_uncaptured_one_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = convolutional().cuda()
    images, labels, ids = labelled(convolutional(), (3, 8, 8), 16)
    repeat, replays = cuda_graph.ReplayedGradient._repeat, []

    def counted(ask: cuda_graph.ReplayedGradient, *arguments: Any) -> Gradient:
        replays.append(1)
        return repeat(ask, *arguments)

    monkeypatch.setattr(cuda_graph.ReplayedGradient, "_repeat", counted)

    def run(worth: int) -> Tensor:
        monkeypatch.setattr(cuda_graph, "WORTH", worth)
        view = View(model, ImageRng(0, ids), width=16, stop=False)
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
            return ATTACKS.create(name, steps=20)(view, images.cuda(), labels.cuda(), Threat("linf", 0.02)).images

    expected = run(worth=10**6)
    assert not replays
    assert torch.equal(run(worth=1), expected)
    assert len(replays) == 20 - cuda_graph.WARM
