"""The interpolated control is its two ends, the line between them, and as open to attack as what it mixes in."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.defenses.fashion import Blind, fashion_batch, fashion_classifier
from vlmdefend.defenses import DEFENSES
from vlmdefend.defenses.base import Defense
from vlmdefend.defenses.composed import create_defense
from vlmdefend.defenses.training_free.interpolate import Interpolate
from vlmdefend.errors import UserError
from vlmdefend.evaluation.cell.attackers import variants
from vlmdefend.models.zero_shot.classifier import ZeroShotClassifier
from vlmdefend.rng import ImageRng
from vlmdefend.types import Batch, Outputs, Pipeline

OTHERS = ["jpeg", "[jpeg:quality=20]", "ensemble:views=6", "r_tpt:views=8", "ttc", "noise"]


@pytest.fixture(scope="module")
def classifier() -> ZeroShotClassifier:
    return fashion_classifier("tiny-rn")


@pytest.fixture(scope="module")
def batch() -> Batch:
    return fashion_batch(4)


def say(defense: Defense, model: Pipeline, batch: Batch) -> Outputs:
    with torch.no_grad():
        return defense.wrap(model)(batch.images, ImageRng(0, batch.ids, "test"))


@pytest.mark.parametrize("of", OTHERS)
def test_its_ends_are_the_bare_model_and_the_other_defense_to_the_bit(
    of: str, classifier: ZeroShotClassifier, batch: Batch
) -> None:
    bare = classifier(batch.images).logits
    other = say(create_defense(of.strip("[]")), classifier, batch).logits
    assert torch.equal(say(Interpolate(of=of, weight=0.0), classifier, batch).logits, bare)
    assert torch.equal(say(Interpolate(of=of, weight=1.0), classifier, batch).logits, other)
    assert not torch.equal(bare, other)


@pytest.mark.parametrize("of", ["jpeg", "ensemble:views=6", "r_tpt:views=8"])
@pytest.mark.parametrize("on", ["features", "logits", "probabilities"])
def test_near_its_ends_it_is_near_them(of: str, on: str, classifier: ZeroShotClassifier, batch: Batch) -> None:
    """Also where the other defense's logits are not what the model says of its features."""
    for weight, expected in ((1e-6, classifier(batch.images).logits), (1 - 1e-6, None)):
        found = say(Interpolate(of=of, weight=weight, on=on), classifier, batch).logits  # type: ignore[arg-type]
        expected = say(create_defense(of), classifier, batch).logits if expected is None else expected
        assert torch.allclose(found.softmax(dim=1), expected.softmax(dim=1), atol=1e-3)


def test_between_them_it_is_what_the_model_says_of_the_mean_embedding(
    classifier: ZeroShotClassifier, batch: Batch
) -> None:
    bare, other = classifier(batch.images), say(create_defense("jpeg"), classifier, batch)
    assert bare.features is not None
    assert other.features is not None
    mean = 0.7 * F.normalize(bare.features, dim=1) + 0.3 * F.normalize(other.features, dim=1)
    found = say(Interpolate(weight=0.3), classifier, batch)
    assert found.features is not None
    assert torch.allclose(found.features, mean, atol=1e-6)
    assert torch.allclose(found.logits, classifier.logits(mean), atol=1e-3)


def test_a_model_of_logits_alone_is_mixed_in_logits_or_probabilities() -> None:
    images, rng = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), ImageRng(0, ["a", "b"])
    bare, other = Blind()(images, rng).logits, create_defense("bit_depth:bits=1").wrap(Blind())(images, rng).logits
    for on in ("features", "logits"):
        found = Interpolate(of="bit_depth:bits=1", weight=0.25, on=on).wrap(Blind())(images, rng)  # type: ignore[arg-type]
        assert torch.allclose(found.logits, 0.75 * bare + 0.25 * other, atol=1e-6)
    found = Interpolate(of="bit_depth:bits=1", weight=0.25, on="probabilities").wrap(Blind())(images, rng)
    assert torch.allclose(found.logits.exp(), 0.75 * bare.softmax(1) + 0.25 * other.softmax(1), atol=1e-6)


@pytest.mark.parametrize("of", ["ttc", "ensemble:views=6", "jpeg", "low_pass"])
def test_an_adaptive_attacker_has_all_that_the_other_defense_gives_and_the_bare_model(
    of: str, classifier: ZeroShotClassifier
) -> None:
    other, defense = create_defense(of), Interpolate(of=of)
    assert defense.recipe.surrogates == other.recipe.surrogates == len(defense.surrogates(classifier))
    assert defense.recipe.samples == other.recipe.samples
    assert defense.recipe.detector_weights == other.recipe.detector_weights
    assert defense.stochastic == other.stochastic == defense.wrap(classifier).stochastic
    assert defense.paradigm == other.paradigm
    assert len(variants("adaptive", defense)) == len(variants("adaptive", other)) + (not other.recipe.bare)
    assert defense.inner == (other,)
    assert Interpolate.recipe.samples == 1  # the class is as it was


def test_the_surrogate_mixes_the_other_surrogates_gradient(classifier: ZeroShotClassifier, batch: Batch) -> None:
    """The codec has none: only the surrogate's gradient differs from the bare model's share."""
    gradients = []
    for pipeline in (
        Interpolate(weight=0.6, on="logits").wrap(classifier),
        Interpolate(weight=0.6, on="logits").surrogate(classifier),
    ):
        pixels = batch.images.clone().requires_grad_(True)
        gradients.append(torch.autograd.grad(pipeline(pixels, ImageRng(0, batch.ids)).logits[:, 0].sum(), pixels)[0])
    pixels = batch.images.clone().requires_grad_(True)
    bare = torch.autograd.grad(classifier(pixels).logits[:, 0].sum(), pixels)[0]
    assert torch.allclose(gradients[0], 0.4 * bare, rtol=1e-3, atol=1e-5)
    pixels = batch.images.clone().requires_grad_(True)
    surrogate = create_defense("jpeg").surrogate(classifier)(pixels, ImageRng(0, batch.ids))
    other = torch.autograd.grad(surrogate.logits[:, 0].sum(), pixels)[0]
    assert torch.allclose(gradients[1], 0.4 * bare + 0.6 * other, rtol=1e-3, atol=1e-4)


def test_it_is_written_as_other_defenses_are() -> None:
    made = DEFENSES.create("interpolate:of=[jpeg:quality=30]:weight=0.25:on=logits")
    assert made == Interpolate(of="[jpeg:quality=30]", weight=0.25, on="logits")
    assert made.inner[0].spec() == {"quality": 30}
    assert Interpolate(of="ttc+jpeg").inner[0].name == "ttc+jpeg"


def test_bad_use_is_said_in_a_sentence() -> None:
    with pytest.raises(UserError, match=r"weight=1\.5"):
        Interpolate(weight=1.5)
    for of in ("randomized_smoothing", "agreement"):
        with pytest.raises(UserError, match="only predicts"):
            Interpolate(of=of)
    with pytest.raises(UserError, match="jpeg"):
        Interpolate(of="jpg")
