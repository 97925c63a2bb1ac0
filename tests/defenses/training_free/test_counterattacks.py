"""What counter-attacks share: the inner gradient, the ascent, the slope of its signs, a detector that can be evaded."""

from __future__ import annotations

import pytest
import torch

from tests.defenses.linear import Linear, rng
from vlmdefend.defenses.base import Defense
from vlmdefend.defenses.training_free._counter_attack import ascent_sign, pixel_gradient, sign_ascent
from vlmdefend.defenses.training_free.anti_adversary import AntiAdversary
from vlmdefend.defenses.training_free.csr import Csr
from vlmdefend.defenses.training_free.doc import Doc
from vlmdefend.defenses.training_free.et3 import Et3
from vlmdefend.defenses.training_free.hedge import Hedge
from vlmdefend.defenses.training_free.mac import Mac
from vlmdefend.defenses.training_free.ttc import Ttc
from vlmdefend.errors import UserError


def test_the_sign_of_an_unrolled_step_has_a_slope() -> None:
    values = torch.tensor([[-2.0, 0.0, 1.0, 1.0]], requires_grad=True)  # mean magnitude 1
    signs = ascent_sign(values)
    assert signs.tolist() == [[-1.0, 0.0, 1.0, 1.0]]
    (slope,) = torch.autograd.grad(signs.sum(), values)
    assert torch.allclose(slope, torch.tensor([[1 / 9, 1.0, 1 / 4, 1 / 4]]))  # 1 / (1 + |g|)^2


def test_the_inner_gradient_is_found_under_no_grad_and_leaves_no_graph_behind() -> None:
    at = torch.tensor([[2.0, 3.0]])
    with torch.no_grad():
        gradient, values = pixel_gradient(lambda x: x.square().sum(dim=1), at, unrolled=True)
    assert gradient.tolist() == [[4.0, 6.0]]
    assert values.tolist() == [13.0]
    assert not gradient.requires_grad
    assert not values.requires_grad
    assert not at.requires_grad


def test_each_step_of_an_ascent_says_what_was_reached_before_it_and_where_it_leads(images: torch.Tensor) -> None:
    """A linear objective: along the signs of its weights, until the ball around the images ends."""
    weights = torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(2))
    way = sign_ascent(
        lambda at: (at * weights).flatten(1).sum(dim=1),
        images + 0.01,
        images,
        eps=0.02,
        alpha=0.015,
        steps=3,
        unrolled=False,
    )
    before, up = images + 0.01, weights > 0
    for step, (rising, falling) in zip(way, ((0.02, -0.005), (0.02, -0.02), (0.02, -0.02)), strict=True):
        assert torch.allclose(step.values, (before * weights).flatten(1).sum(dim=1), atol=1e-5)
        before = images + torch.where(up, rising, falling)
        assert torch.allclose(step.images, before, atol=1e-6)


watching = pytest.mark.parametrize(
    "defense", [Ttc(), Doc(steps=2, draws=2, threshold=1e-3), Mac(steps=2, threshold=0.1)]
)


@watching
def test_the_detector_has_a_gradient_for_an_attacker_who_evades_it(
    defense: Defense, images: torch.Tensor, weights: torch.Tensor
) -> None:
    for surrogate in defense.surrogates(Linear(weights, bend=True)):
        pixels = images.clone().requires_grad_(True)
        score = surrogate(pixels, rng()).detector_score
        assert score is not None
        assert (torch.autograd.grad(score.sum(), pixels)[0].flatten(1).norm(dim=1) > 0).all()


@watching
def test_the_deployed_detector_is_a_constant_to_autograd(
    defense: Defense, images: torch.Tensor, weights: torch.Tensor
) -> None:
    outputs = defense.wrap(Linear(weights, bend=True))(images.clone().requires_grad_(True), rng())
    assert outputs.detector_score is not None
    assert not outputs.detector_score.requires_grad
    assert outputs.logits.requires_grad


@pytest.mark.parametrize(
    ("defense", "options", "reason"),
    [
        (AntiAdversary, {"steps": -1}, "steps=-1"),
        (Hedge, {"eps": -0.1}, "eps=-0.1"),
        (Ttc, {"steps": 0}, "steps=0"),
        (Csr, {"radius": 0.0}, "radius=0"),
        (Et3, {"temperature": 0.0}, "temperature=0"),
        (Doc, {"steps": 0}, "steps=0"),
        (Doc, {"momentum": 1.0}, "momentum=1"),
        (Mac, {"views": 0}, "views=0"),
        (Mac, {"temperature": 0.0}, "temperature=0"),
    ],
)
def test_impossible_settings_are_refused(defense: type[Defense], options: dict[str, float], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        defense(**options)
