"""Every kernel is a sound operator of torch: its schema is true, fake tensors and compilers can pass it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.kernels.conftest import images_around
from vlmdefend.kernels import apgd, l2, linf, margin, momentum, normalize, resize, resize_weights, start

SHAPE = (2, 3, 6, 5)
MEAN, STD = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)


def axis(size: int, side: int) -> resize_weights.AxisResize:
    rows = torch.eye(size).view(1, 1, size, size)
    return resize_weights.AxisResize.of(F.interpolate(rows, (side, size), mode="bicubic", antialias=side < size)[0, 0])


def arguments() -> dict[str, tuple[object, ...]]:
    """Operator -> what it is called with."""
    origin, near, gradient = images_around(SHAPE)
    gradient = gradient.nan_to_num(0.5, 0.5, 0.5)
    each = torch.tensor([0.1, 0.2])
    tables = (*resize._flat(axis(6, 8)), *resize._flat(axis(5, 8)), MEAN, STD)
    return {
        "linf_step_": (near.clone(), gradient.clone(), origin, 0.1, None, 0.0, each),
        "l2_step_": (near.clone(), gradient.clone(), origin, 0.0, each, 0.2, None),
        "momentum_linf_step_": (near.clone(), gradient.clone(), near.clone(), origin, 0.1, None, 0.2, None, 1.0),
        "apgd_linf_step_": (near.clone(), near, gradient.clone(), origin, each, each, 0.1, None),
        "noisy": (origin, gradient, 0.1, None),
        "logit_loss": (torch.randn(4, 6, requires_grad=True), torch.tensor([0, 1, 2, 3]), True),
        "normalized": (origin.clone().requires_grad_(True), MEAN, STD),
        "resized_normalized": (origin.clone().requires_grad_(True), *tables),
        "resized_normalized_back": (torch.rand(2, 3, 8, 8), *tables),
    }


def test_every_operator_is_checked_here() -> None:
    registered = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("vlmdefend::")
    }
    assert registered == set(arguments())


@pytest.mark.parametrize("name", arguments())
def test_schema_gradient_and_shapes_are_as_declared(name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.vlmdefend, name).default, arguments()[name])


def steps(x: Tensor, g: Tensor, o: Tensor, z: Tensor, y: Tensor) -> list[Tensor]:
    """Every public function, once."""
    size = torch.full_like(x[:, 0, 0, 0], 0.1)
    return [
        linf.linf_step_(x.clone(), g.clone(), o, 0.1, 0.2),
        l2.l2_step_(x.clone(), g.clone(), o, size, size),
        momentum.momentum_linf_step_(x.clone(), g.clone(), x.clone(), o, 0.1, 0.2, 1.0),
        apgd.apgd_linf_step_(x.clone(), x, g.clone(), o, size, size * 7.5, 0.1),
        start.noisy(o, g, size),
        margin.margin(z, y),
        margin.dlr(z, y),
        normalize.normalized(o, size[:, None, None][:1].expand(3, 1, 1), size[:, None, None][:1].expand(3, 1, 1)),
    ]


def inputs() -> tuple[Tensor, ...]:
    origin, near, gradient = images_around(SHAPE)
    z = torch.randn(2, 7, generator=torch.Generator().manual_seed(0))
    return near, gradient.nan_to_num(0.5, 0.5, 0.5), origin, z, torch.tensor([3, 1])


def test_fake_tensors_pass_with_the_true_shapes_and_types() -> None:
    expected = steps(*inputs())
    with FakeTensorMode() as mode:
        found = steps(*(mode.from_tensor(t) for t in inputs()))
    for fake, real in zip(found, expected, strict=True):
        assert type(fake).__name__ == "FakeTensor"
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


def test_a_compiler_sees_one_graph_of_operators_with_equal_results() -> None:
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> Callable[..., object]:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch._dynamo.reset()
    found = torch.compile(steps, backend=backend, fullgraph=True)(*inputs())
    for one, other in zip(found, steps(*inputs()), strict=True):
        assert torch.equal(one, other)
    operators = {name.split(".")[1] for name in seen if name.startswith("vlmdefend.")}
    assert operators == set(arguments()) - {"resized_normalized", "resized_normalized_back"}
