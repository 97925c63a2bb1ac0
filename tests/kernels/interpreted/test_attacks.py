"""Whole attacks end at the same images on the fused kernels as on their specification."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.attacks.conftest import convolutional, labelled
from vlmdefend.attacks import ATTACKS
from vlmdefend.attacks.view import View
from vlmdefend.kernels import dispatch
from vlmdefend.rng import ImageRng
from vlmdefend.types import Threat


@pytest.mark.parametrize(
    ("name", "options", "norm", "eps"),
    [
        ("pgd", {"steps": 5, "loss": "dlr"}, "linf", 0.03),
        ("pgd", {"steps": 5, "loss": "cw"}, "l2", 0.3),
        ("apgd-ce", {"steps": 12}, "linf", 0.03),
        ("apgd-dlr", {"steps": 12}, "linf", 0.03),
        ("mi", {"steps": 5}, "linf", 0.03),
    ],
)
def test_an_attack_ends_where_its_specification_does(
    name: str, options: dict[str, object], norm: str, eps: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = convolutional()
    images, labels, ids = labelled(model, (3, 8, 8), 6)

    def run(backend: str, radius: float | Tensor) -> Tensor:
        monkeypatch.setenv(dispatch.VARIABLE, backend)
        view = View(model, ImageRng(0, ids), width=4, stop=False)
        return ATTACKS.create(name, **options)(view, images, labels, Threat(norm, radius)).images  # type: ignore[arg-type]

    for radius in (eps, torch.linspace(0.5 * eps, eps, 6)):
        found, expected = run("triton", radius), run("reference", radius)
        assert not torch.equal(expected, images)
        if norm == "linf" and name != "mi":
            assert torch.equal(found, expected)
        else:  # these sum over an image, in another order
            assert torch.allclose(found, expected, rtol=0.0, atol=1e-5)
