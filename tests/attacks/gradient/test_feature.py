"""Label-free attacks: what they raise, and that the label chooses nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.attacks.conftest import Wrapped, convolutional, labelled, linear
from vlmdefend.attacks import ATTACKS
from vlmdefend.attacks.gradient.feature import Feature
from vlmdefend.attacks.gradient.feature_kl import FeatureKl
from vlmdefend.attacks.view import View
from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng
from vlmdefend.types import Outputs, Threat

SHAPE = (3, 8, 8)
SMALL = {"linf": 8 / 255, "l2": 0.4}
ATTACKED = [Feature(), Feature(distance="cos"), FeatureKl()]


def distance(attack: Feature | FeatureKl, model: Wrapped, images: Tensor, clean: Tensor) -> Tensor:
    """(B,) what the attack raises, written out."""
    with torch.no_grad():
        a, c = model(images), model(clean)
    if isinstance(attack, FeatureKl):
        p, q = c.logits.softmax(1), a.logits.softmax(1)
        return (p * (p / q).log()).sum(1)
    if attack.distance == "l2":
        return ((a.features - c.features) ** 2).sum(1)
    return 1 - (a.features * c.features).sum(1) / (a.features.norm(dim=1) * c.features.norm(dim=1))


def perturbed(attack, model: Wrapped, images: Tensor, labels: Tensor, ids: list[str], threat: Threat) -> Tensor:  # type: ignore[no-untyped-def]
    view = View(model, ImageRng(0, ids), width=4)
    return attack.perturb(view, images, labels, threat, view.rng)


@pytest.mark.parametrize("attack", ATTACKED, ids=repr)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_distance_grows_well_beyond_that_of_noise(attack, norm: str, conv: Wrapped) -> None:  # type: ignore[no-untyped-def]
    images, labels, ids = labelled(conv, SHAPE, 6)
    threat = Threat(norm, SMALL[norm])
    found = perturbed(attack, conv, images, labels, ids, threat)
    noise = threat.random_start(images, ImageRng(1, ids))
    assert (distance(attack, conv, found, images) > 3 * distance(attack, conv, noise, images)).all()


@pytest.mark.parametrize("attack", ATTACKED, ids=repr)
def test_any_label_gives_the_same_images(attack, conv: Wrapped) -> None:  # type: ignore[no-untyped-def]
    images, labels, ids = labelled(conv, SHAPE, 6)
    threat = Threat("linf", SMALL["linf"])
    attack = replace(attack, alpha="2eps", restarts=2)  # so coarse that the best iterate is not the last
    expected = perturbed(attack, conv, images, labels, ids, threat)
    assert torch.equal(perturbed(attack, conv, images, (labels + 1) % 5, ids, threat), expected)


@pytest.mark.parametrize("attack", ATTACKED, ids=repr)
def test_no_image_leaves_early_and_the_result_is_scored_as_it_is(attack) -> None:  # type: ignore[no-untyped-def]
    model = convolutional(seed=5)
    images, labels, ids = labelled(model, SHAPE, 12)
    found = attack(View(model, ImageRng(0, ids)), images, labels, Threat("linf", 0.3))
    assert found.fooled.any()
    assert (found.steps == 10).all()
    assert (found.images != images).flatten(1).any(1).all()


def test_one_step_on_a_linear_model_is_the_sign_of_its_closed_form() -> None:
    """Features W x: the gradient of ||W (x - c)||^2 is 2 W^T W (x - c)."""
    model = linear((6,), 3)
    weight = model.head.weight.detach()
    model.body = torch.nn.Linear(6, 3, bias=False)
    model.head = torch.nn.Linear(3, 3)
    with torch.no_grad():
        model.body.weight.copy_(weight)
    images, labels, ids = labelled(model, (6,), 4)
    threat = Threat("linf", 0.05)
    begin = threat.random_start(images, ImageRng(0, ids).child("restart 0"))
    gradient = (begin - images) @ weight.T @ weight
    expected = images + (begin + 0.05 / 4 * gradient.sign() - images).clamp(-0.05, 0.05)
    better = ((expected - images) @ weight.T).norm(dim=1) > ((begin - images) @ weight.T).norm(dim=1)
    assert better.all()
    assert torch.allclose(perturbed(Feature(steps=1), model, images, labels, ids, threat), expected, atol=1e-6)


def test_the_highest_of_iterates_and_restarts_is_kept() -> None:
    model = convolutional(seed=2)
    images, labels, ids = labelled(model, SHAPE, 10)
    threat = Threat("linf", SMALL["linf"])
    one = Feature(steps=4, alpha="2eps")
    found = distance(one, model, perturbed(one, model, images, labels, ids, threat), images)
    four = Feature(steps=4, alpha="2eps", restarts=4)
    best = distance(four, model, perturbed(four, model, images, labels, ids, threat), images)
    assert (best >= found).all()
    assert (best > found).any()
    fewer = Feature(steps=3, alpha="2eps")
    assert (found >= distance(fewer, model, perturbed(fewer, model, images, labels, ids, threat), images)).all()


def test_a_pipeline_without_features_is_refused_by_the_one_that_needs_them(conv: Wrapped) -> None:
    class NoFeatures(Wrapped):
        def forward(self, images: Tensor, rng: ImageRng | None = None) -> Outputs:
            return Outputs(Wrapped.forward(self, images).logits)

    images, labels, ids = labelled(conv, SHAPE, 2)
    conv.__class__ = NoFeatures
    with pytest.raises(UserError, match="features"):
        perturbed(Feature(), conv, images, labels, ids, Threat("linf", 0.1))
    assert (perturbed(FeatureKl(), conv, images, labels, ids, Threat("linf", 0.1)) != images).any()


def test_options_from_text() -> None:
    assert ATTACKS.create("feature:distance=cos:steps=3") == Feature(distance="cos", steps=3)
    with pytest.raises(UserError, match="steps=0"):
        ATTACKS.create("feature-kl:steps=0")
