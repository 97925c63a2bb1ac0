"""Several defenses around one model: their order, what an attacker is given, and what does not go together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import vlmdefend
from tests.defenses.fashion import fashion_batch, fashion_classifier, streams
from vlmdefend.defenses import DEFENSES
from vlmdefend.defenses.composed import create_defense
from vlmdefend.errors import UserError
from vlmdefend.evaluation.cell.attackers import variants
from vlmdefend.models.zero_shot.classifier import ZeroShotClassifier
from vlmdefend.rng import ImageRng
from vlmdefend.types import Batch, Pipeline

TOGETHER = (
    "blur+bit_depth",
    "ttc+jpeg",
    "jpeg+ttc",
    "ttc+median+blur",
    "r_tpt:views=6+jpeg",
    "clipure_cos:anchor=classes+low_pass",
    "randomized_smoothing:draws=12:selection=4+jpeg",
    "agreement+jpeg",
)


@pytest.fixture(scope="module")
def classifier() -> ZeroShotClassifier:
    return fashion_classifier("tiny-rn")


@pytest.fixture(scope="module")
def batch() -> Batch:
    return fashion_batch(4)


def predict(pipeline: Pipeline, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return pipeline(batch.images, streams(batch)).logits


def test_the_image_meets_the_first_and_then_the_second(classifier: ZeroShotClassifier, batch: Batch) -> None:
    blur, coarse = DEFENSES.create("blur"), DEFENSES.create("bit_depth:bits=2")
    in_order = predict(create_defense("blur+bit_depth:bits=2").wrap(classifier), batch)
    assert torch.equal(in_order, predict(blur.wrap(coarse.wrap(classifier)), batch))
    assert not torch.equal(in_order, predict(coarse.wrap(blur.wrap(classifier)), batch))


def test_a_counter_attack_looks_through_a_codec(classifier: ZeroShotClassifier, batch: Batch) -> None:
    """JPEG itself has no gradient that ttc could follow; its surrogate has one, and the same values."""
    ttc, jpeg = DEFENSES.create("ttc:threshold=9"), DEFENSES.create("jpeg")
    together = predict(create_defense("ttc:threshold=9+jpeg").wrap(classifier), batch)
    assert torch.allclose(together, predict(ttc.wrap(jpeg.surrogate(classifier)), batch), atol=1e-4)
    still = predict(DEFENSES.create("ttc:threshold=9:alpha=0").wrap(jpeg.surrogate(classifier)), batch)
    assert not torch.allclose(together, still, atol=1e-2)


@pytest.mark.parametrize("text", TOGETHER)
def test_every_surrogate_has_the_deployed_values_and_a_gradient(
    text: str, classifier: ZeroShotClassifier, batch: Batch
) -> None:
    defense = create_defense(text)
    surrogates = defense.surrogates(classifier)
    assert len(surrogates) == defense.recipe.surrogates
    deployed = predict(defense.wrap(classifier), batch)
    assert deployed.shape == (4, 10)
    for surrogate in surrogates:
        if not defense.certifies:  # a vote: its surrogate is a mean probability
            assert torch.allclose(deployed, predict(surrogate, batch), rtol=1e-3, atol=1e-2)
        pixels = batch.images.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(surrogate(pixels, ImageRng(0, batch.ids)).logits[:, 0].sum(), pixels)
        assert (gradient.flatten(1).norm(dim=1) > 0).all()


@pytest.mark.parametrize("text", TOGETHER)
def test_mates_do_not_matter(text: str, classifier: ZeroShotClassifier, batch: Batch) -> None:
    pipeline = create_defense(text).wrap(classifier)
    alone = Batch(batch.ids[2:3], batch.images[2:3], batch.labels[2:3])
    assert torch.allclose(predict(pipeline, batch)[2], predict(pipeline, alone)[0], rtol=1e-3, atol=1e-2)


def test_the_recipe_is_that_of_all_parts() -> None:
    ttc, tuned = DEFENSES.create("ttc"), DEFENSES.create("r_tpt")
    recipe = create_defense("r_tpt+ttc").recipe
    assert recipe.surrogates == ttc.recipe.surrogates * tuned.recipe.surrogates
    assert recipe.samples == max(ttc.recipe.samples, tuned.recipe.samples)
    assert recipe.detector_weights == ttc.recipe.detector_weights
    assert recipe.bare
    assert ttc.recipe.text in recipe.text
    assert tuned.recipe.text in recipe.text
    defense = create_defense("r_tpt+ttc")
    assert len(variants("adaptive", defense)) == recipe.surrogates * len(recipe.detector_weights) + 1
    assert defense.stochastic
    assert defense.paradigm == "test-time adaptation"


@pytest.mark.parametrize("name", [name for name in DEFENSES.names() if name not in ("none", "ttc")])
def test_the_detector_behind_any_defense_can_be_quieted(
    name: str, classifier: ZeroShotClassifier, batch: Batch
) -> None:
    """A weight of the detector's term on a score that is missing, or another's, would be no term."""
    outer = "interpolate:of=jpeg" if name == "interpolate" else name
    defense = create_defense(f"{outer}+ttc")
    assert defense.recipe.detector_weights
    for surrogate in defense.surrogates(classifier):
        pixels = batch.images.clone().requires_grad_(True)
        score = surrogate(pixels, ImageRng(0, batch.ids)).detector_score
        assert score is not None
        assert score.shape == (4,)
        assert score.requires_grad


def test_a_defense_that_only_steers_by_a_score_hands_on_that_of_the_detector(
    classifier: ZeroShotClassifier, batch: Batch
) -> None:
    alone, together = (
        create_defense(text).surrogate(classifier)(batch.images, ImageRng(0, batch.ids)).detector_score
        for text in ("dbd", "dbd+ttc")
    )
    assert alone is not None
    assert together is not None
    assert not torch.allclose(alone, together)
    assert (together <= DEFENSES.create("ttc").threshold).all()  # ttc's is threshold - tau


def test_two_exact_defenses_are_an_exact_one() -> None:
    assert create_defense("blur+low_pass").adaptive_equals_whitebox
    assert not create_defense("blur+jpeg").adaptive_equals_whitebox


def test_equal_parts_make_an_equal_defense_and_other_options_make_another() -> None:
    one, other = create_defense("ttc+jpeg:quality=50"), create_defense("ttc+jpeg:quality=75")
    assert one == create_defense("ttc+jpeg:quality=50")
    assert one != other
    assert one.name == other.name == "ttc+jpeg"
    assert one.spec()["jpeg.quality"] == 50
    assert {key for key in one.spec() if one.spec()[key] != other.spec()[key]} == {"jpeg.quality"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("ttc+", "nothing beside"),
        ("none+jpeg", "leave out none"),
        ("jpeg+jpeg:quality=50", "once"),
        ("jpeg+randomized_smoothing", r"randomized_smoothing\+jpeg"),
        ("jpeg+agreement", r"agreement\+jpeg"),
        ("jpeg+tcc", "ttc"),
    ],
)
def test_what_does_not_go_together_is_refused(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        create_defense(text)


def test_a_defense_of_embeddings_refuses_logits_without_any(classifier: ZeroShotClassifier) -> None:
    with pytest.raises(UserError, match="gives logits only"):
        create_defense("clipure_cos+ensemble").wrap(classifier)


def test_evaluate_takes_them_and_the_record_holds_all_options(tmp_path: Path) -> None:
    found = vlmdefend.evaluate(
        tmp_path, model="tiny-rn", defense="ttc+jpeg:quality=50", eps="4/255", attack="pgd:steps=2", limit=4
    )
    assert not found.failures
    cells = {record.cell.attacker: record.cell for record, _ in found.results}
    assert set(cells) == {"transfer", "whitebox", "adaptive"}
    assert cells["adaptive"].defense == "ttc+jpeg"
    assert cells["adaptive"].defense_config["jpeg.quality"] == 50
    assert cells["adaptive"].defense_config["ttc.steps"] == 2
