"""What every defense leaves of a model whose parameters could be trained: everything, also when it fails on the way."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.defenses.cases import Case, every
from tests.defenses.fashion import fashion_batch, fingerprint
from vlmdefend.evaluation.cell.query_count import CountingModel
from vlmdefend.models.zero_shot.classifier import ZeroShotClassifier
from vlmdefend.rng import ImageRng
from vlmdefend.types import Batch, Outputs, Pipeline


@pytest.fixture(scope="module")
def batch() -> Batch:
    return fashion_batch(8)


@pytest.fixture
def classifier(case: Case, classifiers: dict[str, ZeroShotClassifier]) -> Iterator[ZeroShotClassifier]:
    """With trainable parameters: the embedded ones are frozen, and no frozen parameter ever gets a gradient."""
    found = classifiers[case.model]
    found.clip.requires_grad_(True)
    yield found
    found.clip.requires_grad_(False)
    for parameter in found.clip.parameters():
        parameter.grad = None


def sides(case: Case, model: Pipeline) -> Iterator[tuple[Pipeline, bool]]:
    """Runs the deployed pipeline without and with a graph, and all surrogates."""
    defense = case.create()
    yield defense.wrap(model), False
    for pipeline in (defense.wrap(model), *defense.surrogates(model)):
        yield pipeline, True


def ask(pipeline: Pipeline, images: torch.Tensor, ids: list[str], *, graph: bool) -> torch.Tensor:
    """Logits, and with a graph their gradient too, as an attacker asks for it."""
    with torch.set_grad_enabled(graph):
        pixels = images.clone().requires_grad_(graph)
        logits = pipeline(pixels, ImageRng(0, ids, "test")).logits
        if graph and logits.requires_grad:
            torch.autograd.grad(logits.sum(), pixels, allow_unused=True)
    assert torch.equal(pixels.detach(), images)
    return logits.detach()


def state(classifier: ZeroShotClassifier) -> tuple[object, ...]:
    modules, parameters = list(classifier.clip.modules()), list(classifier.clip.parameters())
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in modules)
    return (
        fingerprint(classifier),
        [p.requires_grad for p in parameters],
        [p.grad is None for p in parameters],
        [m.training for m in modules],
        hooks,
        torch.is_grad_enabled(),
        torch.get_rng_state().tolist(),
    )


@every
def test_the_model_is_the_same_after_predictions_and_gradients(
    case: Case, classifier: ZeroShotClassifier, batch: Batch
) -> None:
    """Nothing touches the global generator either."""
    before = state(classifier)
    for pipeline, graph in sides(case, classifier):
        assert pipeline.num_classes == 10
        assert ask(pipeline, batch.images, batch.ids, graph=graph).shape == (8, 10)
        assert state(classifier) == before


class Failing(CountingModel):
    """Raises in the ``last`` forward or backward pass."""

    def __init__(self, model: Pipeline) -> None:
        super().__init__(model)
        self.asked, self.last = 0, 0

    def __call__(self, images: torch.Tensor, rng: ImageRng) -> Outputs:
        self._ask()
        return super().__call__(images, rng)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        self._ask()
        return super().features(images)

    def _count_backward(self, images: int) -> None:
        self._ask()

    def _ask(self) -> None:
        self.asked += 1
        if self.asked == self.last:
            raise ConnectionError("the model is gone")


@every
def test_a_failure_on_the_way_leaves_nothing_behind(case: Case, classifier: ZeroShotClassifier, batch: Batch) -> None:
    """At up to eight moments, the first and the last among them."""
    images, ids = batch.images[:1], batch.ids[:1]
    before, failing = state(classifier), Failing(classifier)
    for pipeline, graph in sides(case, failing):
        failing.asked = 0
        first = ask(pipeline, images, ids, graph=graph)
        for last in sorted({1 + k * (failing.asked - 1) // 7 for k in range(8)}):
            failing.asked, failing.last = 0, last
            with pytest.raises(ConnectionError):
                ask(pipeline, images, ids, graph=graph)
            assert state(classifier) == before
        failing.last = 0
        assert torch.equal(ask(pipeline, images, ids, graph=graph), first)
