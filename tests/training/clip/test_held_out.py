"""Tests of accuracy on held-out images and of the proxy gap."""

from __future__ import annotations

import torch

from tests.training.conftest import CLASSES, EPS, TEMPLATES, batch_of
from vlmdefend.models.clip.vision_language import VisionLanguageModel
from vlmdefend.rng import ImageRng
from vlmdefend.training.clip.distillation_job import warnings_of
from vlmdefend.training.clip.held_out import accuracies, proxy_gap
from vlmdefend.training.loop.processes import Processes
from vlmdefend.training.loop.results import HitCount, ProxyGap
from vlmdefend.types import Batch, Outputs, Pipeline


class RecordingPipeline:
    """A pipeline that records the images of its forwards."""

    stochastic = False

    def __init__(self, inner: Pipeline) -> None:
        self.inner, self.num_classes, self.seen = inner, inner.num_classes, []

    def __call__(self, images: torch.Tensor, rng: ImageRng) -> Outputs:
        self.seen.append(images.detach().clone())
        return self.inner(images, rng)


def own_labels(model: VisionLanguageModel, count: int) -> tuple[Pipeline, Batch]:
    """Returns a pipeline and images labelled with its own predictions."""
    pipeline, batch = model.zero_shot(CLASSES, TEMPLATES), batch_of(count)
    with torch.no_grad():
        labels = pipeline(batch.images).logits.argmax(1)
    return pipeline, batch._replace(labels=labels)


def test_accuracy_is_clean_and_after_pgd(target: VisionLanguageModel) -> None:
    pipeline, batch = own_labels(target, 12)
    found = accuracies(pipeline, batch, 0.5, 0, Processes("cpu"))  # these weights are random, and hard to move
    assert found.clean == HitCount(12, 12)
    assert found.robust.hits < 12
    assert accuracies(pipeline, batch, 0.0, 0, Processes("cpu")).robust == HitCount(12, 12)


def test_the_counts_do_not_depend_on_the_number_of_processes(target: VisionLanguageModel) -> None:
    pipeline, batch = own_labels(target, 7)
    whole = accuracies(pipeline, batch, EPS, 0, Processes("cpu"))
    parts = []
    for rank in range(2):
        processes = Processes("cpu")
        processes.rank, processes.count = rank, 2
        processes.sum_numbers = lambda numbers: numbers  # type: ignore[method-assign]
        parts.append(accuracies(pipeline, batch, EPS, 0, processes))
    assert sum(part.clean.hits for part in parts) == whole.clean.hits
    assert sum(part.robust.hits for part in parts) == whole.robust.hits


def test_the_proxy_classifies_the_targets_adversarial_images_which_are_all_attacked(
    target: VisionLanguageModel, proxy: VisionLanguageModel
) -> None:
    pipeline, batch = own_labels(target, 8)
    spy = RecordingPipeline(proxy.zero_shot(CLASSES, TEMPLATES))
    gap = proxy_gap("t", {"t": pipeline, "p": spy}, batch, EPS, 0)
    clean, adversarial = spy.seen
    assert torch.equal(clean, batch.images)
    distance = (adversarial - batch.images).flatten(1).abs().amax(1)
    assert (distance > 0.9 * EPS).all()  # also those that were fooled at once
    assert (distance <= EPS + 1e-6).all()
    with torch.no_grad():
        hits = int((pipeline(adversarial).logits.argmax(1) == batch.labels).sum())
    assert gap.adversarial["t"] == HitCount(hits, 8)
    assert gap.clean["t"] == HitCount(8, 8)


def gap_of(target_clean: int, proxy_clean: int, proxy_adversarial: int) -> ProxyGap:
    return ProxyGap(
        "t",
        {"target": HitCount(target_clean, 100), "proxy": HitCount(proxy_clean, 100)},
        {"target": HitCount(0, 100), "proxy": HitCount(proxy_adversarial, 100)},
    )


def test_pairs_that_the_paper_advises_against_give_warnings() -> None:
    assert warnings_of(gap_of(60, 80, 60)) == []
    (kept,) = warnings_of(gap_of(60, 80, 59))
    assert "keeps 59.0 % of 80.0 %, less than three quarters" in kept
    (worse,) = warnings_of(gap_of(81, 80, 79))
    assert "the proxy generalises less well than the target (80.0 % against 81.0 % clean)" in worse
