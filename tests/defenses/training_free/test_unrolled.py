"""Unrolled counter-attacks and detectors have the gradients of finite differences, in double precision."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.defenses.linear import SIZE, Linear
from vlmdefend.defenses.base import Defense
from vlmdefend.defenses.training_free import _counter_attack
from vlmdefend.defenses.training_free.anti_adversary import AntiAdversary
from vlmdefend.defenses.training_free.csr import Csr
from vlmdefend.defenses.training_free.doc import Doc
from vlmdefend.defenses.training_free.et3 import Et3
from vlmdefend.defenses.training_free.hedge import Hedge
from vlmdefend.defenses.training_free.mac import Mac
from vlmdefend.defenses.training_free.ttc import Ttc
from vlmdefend.rng import ImageRng
from vlmdefend.types import Outputs, Pipeline

pytestmark = pytest.mark.numerics

# Steps inside the balls, and gates and thresholds that are open: at a corner nothing follows the image.
TTC = Ttc(eps=0.2, alpha=0.06, threshold=9.0)
DOC = Doc(eps=0.2, alpha=0.06, steps=2, draws=2, threshold=0.02, sharpness=50.0)
MAC = Mac(eps=0.2, steps=4, threshold=0.2, temperature=0.1)
CSR = Csr(eps=0.2, alpha=0.06, threshold=1.0, radius=0.2)
COUNTER_ATTACKS = [
    AntiAdversary(alpha=0.06),
    CSR,
    DOC,
    Et3(alpha=0.2, radius=10.0, steps=2, scaled=False),
    Hedge(eps=0.2, alpha=0.06, steps=2),
    MAC,
    TTC,
]


@pytest.fixture
def model() -> Linear:
    return Linear(torch.randn(3, 3 * SIZE * SIZE, generator=torch.Generator().manual_seed(3)).double(), bend=True)


@pytest.fixture(autouse=True)
def smooth_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sign has no slope that differences could find; this is one by its length, and has its true slope."""

    def smooth(gradient: Tensor) -> Tensor:
        return torch.tanh(gradient / gradient.abs().mean(dim=(1, 2, 3), keepdim=True))

    monkeypatch.setattr(_counter_attack, "_SIGN", smooth)


def slopes(pipelines: list[Pipeline], value: Callable[[Outputs], Tensor]) -> list[Tensor]:
    """Of the first pipeline by differences along a direction, and of all the others by autograd."""
    generator = torch.Generator().manual_seed(4)
    image = (0.3 + 0.4 * torch.rand(1, 3, SIZE, SIZE, generator=generator)).double()
    direction = torch.randn(image.shape, generator=generator).double()

    def at(pipeline: Pipeline, pixels: Tensor) -> Tensor:
        return value(pipeline(pixels, ImageRng(0, ["a"])))

    deployed, *surrogates = pipelines
    high, low = (at(deployed, image + step * direction) for step in (1e-6, -1e-6))
    found = [(high - low).detach() / 2e-6]
    for surrogate in surrogates:
        pixels = image.clone().requires_grad_(True)
        found.append((torch.autograd.grad(at(surrogate, pixels), pixels)[0] * direction).sum())
    return found


@pytest.mark.parametrize("defense", COUNTER_ATTACKS, ids=lambda defense: defense.name)
def test_unrolled_it_has_the_gradient_of_finite_differences_and_as_a_constant_it_has_not(
    defense: Defense, model: Linear
) -> None:
    pipelines = [defense.wrap(model), *defense.surrogates(model)[-2:]]  # hedge has another before these
    slope, constant, unrolled = slopes(pipelines, lambda outputs: outputs.logits[:, 0].sum())
    assert torch.allclose(unrolled, slope, rtol=1e-5)
    assert not torch.allclose(constant, slope, rtol=5e-3)


@pytest.mark.parametrize("defense", [CSR, DOC, MAC, TTC], ids=lambda defense: defense.name)
def test_in_both_surrogates_the_detector_has_the_gradient_of_finite_differences(
    defense: Defense, model: Linear
) -> None:
    """Deployed it is cut; a constant perturbation has a detector that is not."""

    def score(outputs: Outputs) -> Tensor:
        assert outputs.detector_score is not None
        return outputs.detector_score.sum()

    slope, constant, unrolled = slopes([defense.wrap(model), *defense.surrogates(model)], score)
    assert slope.abs() > 1e-3
    assert torch.allclose(unrolled, slope, rtol=1e-5)
    assert torch.allclose(constant, slope, rtol=1e-5)
