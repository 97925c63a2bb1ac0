"""Every defense of the registry keeps its paradigm's promises; a new defense file is tested without a new test.

What it leaves of the model's state is in test_contract_state.py, the settings in cases.py.
"""

from __future__ import annotations

import inspect

import pytest
import torch

from tests.defenses.cases import ACTING, CASES, NAMES, Case, every
from tests.defenses.fashion import fashion_batch
from vlmdefend.defenses import DEFENSES
from vlmdefend.defenses.base import Defense, Recipe
from vlmdefend.models.zero_shot.classifier import ZeroShotClassifier
from vlmdefend.published.evidence import evidence_on
from vlmdefend.rng import ImageRng
from vlmdefend.types import Batch

pytestmark = pytest.mark.numerics

# The evaluator's own tolerance.
RTOL, ATOL = 1e-3, 1e-2


@pytest.fixture(scope="module")
def batch() -> Batch:
    return fashion_batch(8)


@pytest.fixture
def classifier(case: Case, classifiers: dict[str, ZeroShotClassifier]) -> ZeroShotClassifier:
    return classifiers[case.model]


def predict(pipeline, images, ids, seed: int = 0) -> torch.Tensor:  # type: ignore[no-untyped-def]
    with torch.no_grad():
        return pipeline(images, ImageRng(seed, ids, "test")).logits


@pytest.mark.parametrize("name", NAMES)
def test_says_what_it_is(name: str) -> None:
    cls = DEFENSES.get(name)
    instance = DEFENSES.create(name)
    assert cls.summary
    assert cls.citation
    evidence = evidence_on(name)
    assert evidence.papers or evidence.measured, f"write vlmdefend/published/defenses/{name}.yaml"
    assert cls.recipe.text
    assert cls.changes
    assert cls.recipe.samples >= 1
    assert cls.paradigm in ("none", "training-time", "test-time adaptation", "training-free")
    assert DEFENSES.create(name, **instance.spec()) == instance
    assert name == cls.__module__.rpartition(".")[2]
    assert not (cls.stochastic and instance.adaptive_equals_whitebox)


@every
def test_it_has_as_many_surrogates_as_its_recipe_states(case: Case, classifier: ZeroShotClassifier) -> None:
    defense = case.create()
    assert len(defense.surrogates(classifier)) == defense.recipe.surrogates


def effect(case: Case, classifier: ZeroShotClassifier, batch: Batch) -> float:
    """The largest change of a logit, or the spread of a detector that changes none, by what the contracts tolerate."""
    defense, bare = case.create(), predict(classifier, batch.images, batch.ids)
    with torch.no_grad():
        outputs = defense.wrap(classifier)(batch.images, ImageRng(0, batch.ids, "test"))
    if defense.rejects:
        assert outputs.detector_score is not None
        return 10 * float(outputs.detector_score.max() - outputs.detector_score.min()) / ATOL
    return float(((outputs.logits - bare).abs() / (ATOL + RTOL * bare.abs())).max())


@pytest.mark.parametrize("name", [name for name in NAMES if DEFENSES.get(name).paradigm != "none"])
def test_no_contract_is_kept_by_doing_nothing(
    name: str, classifiers: dict[str, ZeroShotClassifier], batch: Batch
) -> None:
    effects = {case: effect(case, classifiers[case.model], batch) for case in CASES if case.name == name}
    assert max(effects.values()) > 10, "cases.py needs settings under which it acts"
    assert all(found > 10 for case, found in effects.items() if case in ACTING)


@every
def test_same_seed_same_prediction_whatever_the_mates(case: Case, classifier: ZeroShotClassifier, batch: Batch) -> None:
    """The promise is one of batches of the same size and an image in its place: see ``Defense``'s docstring."""
    defense = case.create()
    pipeline = defense.wrap(classifier)
    assert pipeline.stochastic == defense.stochastic
    together = predict(pipeline, batch.images, batch.ids)
    assert torch.equal(together, predict(pipeline, batch.images, batch.ids))
    assert defense.stochastic != torch.equal(together, predict(pipeline, batch.images, batch.ids, seed=1))
    for i in (0, 5):
        images, ids = with_other_mates(batch, i)
        assert torch.allclose(predict(pipeline, images, ids)[i], together[i], rtol=RTOL, atol=ATOL)


def with_other_mates(batch: Batch, kept: int) -> tuple[torch.Tensor, list[str]]:
    """The batch with image ``kept`` in its place and other images, under other ids, in all other places."""
    images, ids = 1 - batch.images.flip(3), [f"other-{name}" for name in batch.ids]
    images[kept], ids[kept] = batch.images[kept], batch.ids[kept]
    return images, ids


@every
def test_the_surrogate_has_the_values_of_the_deployed_pipeline(
    case: Case, classifier: ZeroShotClassifier, batch: Batch
) -> None:
    """A vote has no gradient, so its surrogate has other values, and the same winner where that is certain."""
    defense = case.create()
    with torch.no_grad():
        deployed = defense.wrap(classifier)(batch.images, ImageRng(0, batch.ids, "test"))
    for surrogate in defense.surrogates(classifier):
        logits = predict(surrogate, batch.images, batch.ids)
        if deployed.certified_radius is None:
            assert torch.allclose(deployed.logits, logits, rtol=RTOL, atol=ATOL)
        else:
            certain = deployed.certified_radius == deployed.certified_radius.max()
            assert torch.equal(deployed.predictions[certain], logits.argmax(dim=1)[certain])


@pytest.mark.parametrize(
    "case", [case for case in CASES if not case.create().stochastic], ids=lambda case: f"{case.text}-{case.model}"
)
def test_the_surrogate_has_the_same_values_with_a_graph(
    case: Case, classifier: ZeroShotClassifier, batch: Batch
) -> None:
    """An attack ends for an image as soon as these values are those of a wrong class."""
    images, ids = batch.images[:2], batch.ids[:2]
    for surrogate in case.create().surrogates(classifier):
        without = predict(surrogate, images, ids)
        with_graph = surrogate(images.clone().requires_grad_(True), ImageRng(0, ids, "test")).logits.detach()
        assert torch.allclose(with_graph, without, rtol=RTOL, atol=ATOL)


@every
def test_the_surrogate_has_a_gradient(case: Case, classifier: ZeroShotClassifier, batch: Batch) -> None:
    for surrogate in case.create().surrogates(classifier):
        pixels = batch.images.clone().requires_grad_(True)
        outputs = surrogate(pixels, ImageRng(0, batch.ids))
        (gradient,) = torch.autograd.grad(outputs.logits[:, 0].sum(), pixels)
        assert gradient.isfinite().all()
        assert (gradient.flatten(1).norm(dim=1) > 0).all()


@every
def test_labels_never_reach_it(case: Case, classifier: ZeroShotClassifier) -> None:
    """All that it is given are a model, images, and streams that know a seed, a purpose and opaque names."""
    defense = case.create()
    assert list(inspect.signature(defense.wrap).parameters) == ["model"]
    for pipeline in (defense.wrap(classifier), *defense.surrogates(classifier)):
        if pipeline is not classifier:  # a module's signature says nothing
            assert list(inspect.signature(pipeline).parameters) == ["images", "rng"]
    assert set(vars(ImageRng(0, ["a"]))) == {"seed", "_ids", "purpose", "_streams"}


@pytest.mark.parametrize("name", [name for name in NAMES if DEFENSES.get(name).neutral is not None])
def test_at_zero_strength_it_is_the_bare_model(
    name: str, classifiers: dict[str, ZeroShotClassifier], batch: Batch
) -> None:
    classifier = classifiers["tiny-rn"]
    neutral = DEFENSES.get(name).neutral
    assert neutral is not None
    defended = predict(DEFENSES.create(name, **neutral).wrap(classifier), batch.images, batch.ids)
    assert torch.allclose(defended, predict(classifier, batch.images, batch.ids), rtol=1e-4, atol=1e-3)


def test_a_defense_without_a_recipe_cannot_be_defined() -> None:
    with pytest.raises(TypeError, match="recipe"):
        type("Hopeful", (Defense,), {"name": "hopeful", "wrap": lambda self, model: model})
    type("Honest", (Defense,), {"name": "honest", "recipe": Recipe("exact"), "wrap": lambda self, model: model})
