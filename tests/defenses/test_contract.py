"""Every defense of the registry keeps its paradigm's promises; a new defense file is tested without a new test."""

from __future__ import annotations

import hashlib
import inspect

import pytest
import torch

import vlmdefend
from vlmdefend.data.loader import load_batch
from vlmdefend.data.transforms import PixelTransform
from vlmdefend.defenses import DEFENSES
from vlmdefend.defenses.base import Defense, Recipe
from vlmdefend.evaluation.counting import Counted
from vlmdefend.models.vision_language import VisionLanguageModel
from vlmdefend.models.zero_shot import ZeroShotClassifier
from vlmdefend.rng import ImageRng
from vlmdefend.types import Batch, Outputs, Pipeline

NAMES = DEFENSES.names()
every = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def model() -> VisionLanguageModel:
    return vlmdefend.load_model("tiny-rn", device="cpu")


@pytest.fixture(scope="module")
def classifier(model: VisionLanguageModel) -> ZeroShotClassifier:
    images = vlmdefend.load_dataset("fashion", limit=1)
    return model.zero_shot(images.class_names, ["a photo of a {c}."])


@pytest.fixture(scope="module")
def batch(model: VisionLanguageModel) -> Batch:
    return load_batch(
        vlmdefend.load_dataset("fashion", limit=8), range(8), PixelTransform(model.image_size), skip_bad=False
    )[0]


def fingerprint(model: VisionLanguageModel) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.clip.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def predict(pipeline, images, ids, seed: int = 0) -> torch.Tensor:  # type: ignore[no-untyped-def]
    with torch.no_grad():
        return pipeline(images, ImageRng(seed, ids, "test")).logits


def surrogates(defense: Defense, model: Pipeline) -> tuple[Pipeline, ...]:
    """All stand-ins of an adaptive attacker, as many as the recipe says."""
    found = defense.surrogates(model)
    assert len(found) == defense.recipe.surrogates
    return found


@every
def test_says_what_it_is(name: str) -> None:
    cls = DEFENSES.get(name)
    instance = DEFENSES.create(name)
    assert cls.summary
    assert cls.citation
    assert cls.recipe.text
    assert cls.changes
    assert cls.recipe.samples >= 1
    assert cls.paradigm in ("none", "training-time", "test-time adaptation", "training-free")
    assert DEFENSES.create(name, **instance.spec()) == instance
    assert name == cls.__module__.rpartition(".")[2]
    assert not (cls.stochastic and instance.adaptive_equals_whitebox)


@every
@pytest.mark.parametrize("side", ["wrap", "surrogate"])
def test_the_model_is_the_same_after_predictions_and_gradients(
    name: str, side: str, model: VisionLanguageModel, classifier: ZeroShotClassifier, batch: Batch
) -> None:
    before = fingerprint(model)
    pipeline = getattr(DEFENSES.create(name), side)(classifier)
    pixels = batch.images.clone().requires_grad_(True)
    logits = pipeline(pixels, ImageRng(0, batch.ids)).logits
    assert logits.shape == (8, 10)
    assert pipeline.num_classes == 10
    if logits.requires_grad:
        torch.autograd.grad(logits.sum(), pixels, allow_unused=True)
    assert fingerprint(model) == before
    assert all(p.grad is None for p in model.clip.parameters())
    assert torch.equal(pixels.detach(), batch.images)


@every
def test_same_seed_same_prediction_and_mates_do_not_matter(
    name: str, classifier: ZeroShotClassifier, batch: Batch
) -> None:
    defense = DEFENSES.create(name)
    pipeline = defense.wrap(classifier)
    assert pipeline.stochastic == defense.stochastic
    together = predict(pipeline, batch.images, batch.ids)
    assert torch.equal(together, predict(pipeline, batch.images, batch.ids))
    assert defense.stochastic != torch.equal(together, predict(pipeline, batch.images, batch.ids, seed=1))
    for i in (0, 5):
        alone = predict(pipeline, batch.images[i : i + 1], batch.ids[i : i + 1])
        # the evaluator's own tolerance: a sign step turns the last bit of a small gradient into a step of its own
        assert torch.allclose(alone[0], together[i], rtol=1e-3, atol=1e-2)


@every
def test_the_surrogate_has_the_values_of_the_deployed_pipeline(
    name: str, classifier: ZeroShotClassifier, batch: Batch
) -> None:
    """A vote has no gradient, so what stands in for it has other values, and the same winner where that is certain."""
    defense = DEFENSES.create(name)
    with torch.no_grad():
        deployed = defense.wrap(classifier)(batch.images, ImageRng(0, batch.ids, "test"))
        stand_ins = [p(batch.images, ImageRng(0, batch.ids, "test")).logits for p in surrogates(defense, classifier)]
    # and with a graph, where an attacker leaves as soon as these values say so
    for number, pipeline in enumerate(() if defense.stochastic else surrogates(defense, classifier)):
        pixels = batch.images[:2].clone().requires_grad_(True)
        logits = pipeline(pixels, ImageRng(0, batch.ids[:2], "test")).logits.detach()
        spread = stand_ins[number].max() - stand_ins[number].min()
        assert (
            logits - stand_ins[number][:2]
        ).abs().max() < 0.05 * spread  # 20 sign steps add up what batches differ by
    for stand_in in stand_ins:
        if deployed.certified_radius is None:
            assert torch.allclose(deployed.logits, stand_in, rtol=1e-3, atol=1e-2)
        else:
            certain = deployed.certified_radius == deployed.certified_radius.max()
            assert torch.equal(deployed.predictions[certain], stand_in.argmax(dim=1)[certain])


@every
def test_the_surrogate_has_a_gradient(name: str, classifier: ZeroShotClassifier, batch: Batch) -> None:
    for surrogate in surrogates(DEFENSES.create(name), classifier):
        pixels = batch.images.clone().requires_grad_(True)
        outputs = surrogate(pixels, ImageRng(0, batch.ids))
        (gradient,) = torch.autograd.grad(outputs.logits[:, 0].sum(), pixels)
        assert gradient.isfinite().all()
        assert (gradient.flatten(1).norm(dim=1) > 0).all()


@every
def test_labels_never_reach_it(name: str, classifier: ZeroShotClassifier) -> None:
    """All that it is given are a model, images, and streams that know a seed, an id and a purpose."""
    defense = DEFENSES.create(name)
    assert list(inspect.signature(defense.wrap).parameters) == ["model"]
    for pipeline in (defense.wrap(classifier), *surrogates(defense, classifier)):
        if pipeline is not classifier:  # a module's signature says nothing
            assert list(inspect.signature(pipeline).parameters) == ["images", "rng"]
    assert set(vars(ImageRng(0, ["a"]))) == {"seed", "ids", "purpose", "_streams"}


class Failing(Counted):
    """Breaks down when it is asked for the ``last`` time."""

    def __init__(self, model: Pipeline) -> None:
        super().__init__(model)
        self.asked, self.last = 0, 0

    def __call__(self, images: torch.Tensor, rng: ImageRng) -> Outputs:
        self._ask()
        return super().__call__(images, rng)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        self._ask()
        return super().features(images)

    def _ask(self) -> None:
        self.asked += 1
        if self.asked == self.last:
            raise ConnectionError("the model is gone")


def state(model: VisionLanguageModel) -> tuple[object, ...]:
    modules = list(model.clip.modules())
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in modules)
    return (
        fingerprint(model),
        [p.requires_grad for p in model.clip.parameters()],
        [p.grad is None for p in model.clip.parameters()],
        [m.training for m in modules],
        hooks,
        torch.is_grad_enabled(),
        torch.get_rng_state().tolist(),
    )


@every
def test_a_failure_on_the_way_leaves_nothing_behind(
    name: str, model: VisionLanguageModel, classifier: ZeroShotClassifier, batch: Batch
) -> None:
    """As it is deployed, and where an attacker wants a gradient; and nothing touches the global generator."""
    images, ids, defense = batch.images[:2], batch.ids[:2], DEFENSES.create(name)
    before = state(model)
    for side, graph in (("wrap", False), ("surrogate", True)):
        failing = Failing(classifier)
        pipeline = getattr(defense, side)(failing)

        def ask(pipeline: Pipeline = pipeline, graph: bool = graph) -> torch.Tensor:
            with torch.set_grad_enabled(graph):
                pixels = images.clone().requires_grad_(graph)
                return pipeline(pixels, ImageRng(0, ids, "test")).logits.detach()

        first = ask()
        failing.asked, failing.last = 0, failing.asked
        with pytest.raises(ConnectionError):
            ask()
        assert state(model) == before
        failing.last = 0
        assert torch.equal(ask(), first)


@pytest.mark.parametrize("name", [name for name in NAMES if DEFENSES.get(name).neutral is not None])
def test_at_zero_strength_it_is_the_bare_model(name: str, classifier: ZeroShotClassifier, batch: Batch) -> None:
    neutral = DEFENSES.get(name).neutral
    assert neutral is not None
    defended = predict(DEFENSES.create(name, **neutral).wrap(classifier), batch.images, batch.ids)
    assert torch.allclose(defended, predict(classifier, batch.images, batch.ids), rtol=1e-4, atol=1e-3)


def test_a_defense_without_a_recipe_cannot_be_defined() -> None:
    with pytest.raises(TypeError, match="recipe"):
        type("Hopeful", (Defense,), {"name": "hopeful", "wrap": lambda self, model: model})
    type("Honest", (Defense,), {"name": "honest", "recipe": Recipe("exact"), "wrap": lambda self, model: model})
