"""Gradient queries are replayed only where they may be, count as usual, and give what a query gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.attacks.conftest import Wrapped, labelled
from vlmdefend.attacks import ATTACKS, cuda_graph
from vlmdefend.attacks.criterion import Criterion
from vlmdefend.attacks.cuda_graph import WARM, WORTH, ReplayedGradient, replayable
from vlmdefend.attacks.losses import LOSSES
from vlmdefend.attacks.view import View
from vlmdefend.rng import ImageRng
from vlmdefend.types import Outputs, Threat

SHAPE, COUNT = (3, 8, 8), 4
Work = Callable[[], tuple[Tensor, ...]]


class Tape:
    """Stands for a CUDA graph: the same work again, its results in the same buffers."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def __call__(self, work: Work) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
        self.captures += 1
        buffers = tuple(torch.full_like(result, 77) for result in work())  # a capture computes nothing

        def replay() -> None:
            self.replays += 1
            for buffer, result in zip(buffers, work(), strict=True):
                buffer.copy_(result)

        return buffers, replay


@pytest.fixture
def as_if_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graph, "replayable", lambda view, images, criterion: len(images) == view.width)


def views(conv: Wrapped) -> tuple[View, View, Tensor, Tensor]:
    images, labels, ids = labelled(conv, SHAPE, COUNT)
    return View(conv, ImageRng(0, ids), width=COUNT), View(conv, ImageRng(0, ids), width=COUNT), images, labels


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.usefixtures("as_if_on_a_gpu")
def test_a_replay_gives_and_counts_what_a_query_does(conv: Wrapped, targeted: bool) -> None:
    view, plain, images, labels = views(conv)
    tape = Tape()
    ask = ReplayedGradient(LOSSES["ce"], WORTH, tape)
    kept = []
    for number in range(WARM + 3):
        x = (images + 0.01 * number).clamp(0, 1)
        x[0] = images[0] if number else 0.5
        turned = labels.roll(number)  # other images in the slots
        criterion = Criterion(turned, (turned + 1) % 5 if targeted else None)
        found, expected = ask(view, x, criterion), plain.gradient(x, criterion, LOSSES["ce"])
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        kept.append((found.logits, expected.logits))
        found.pixels.zero_()  # the caller's to overwrite
    assert (tape.captures, tape.replays) == (1, 3)
    assert all(torch.equal(one, other) for one, other in kept)  # later replays leave earlier logits alone
    assert torch.equal(view.queries.forwards, plain.queries.forwards)
    assert torch.equal(view.queries.backwards, plain.queries.backwards)
    assert view.queries.gradient_values == plain.queries.gradient_values
    assert torch.equal(view.queries.zero_gradients, plain.queries.zero_gradients)


@pytest.mark.usefixtures("as_if_on_a_gpu")
def test_a_capture_that_fails_is_tried_once_and_the_run_goes_on(conv: Wrapped) -> None:
    view, plain, images, labels = views(conv)
    tried = []

    def refuse(work: Work) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
        tried.append(work)
        raise RuntimeError("operation not permitted when stream is capturing")

    ask = ReplayedGradient(LOSSES["ce"], WORTH, refuse)
    for _ in range(WARM + 3):
        found, expected = ask(view, images, Criterion(labels)), plain.gradient(images, Criterion(labels), LOSSES["ce"])
        assert torch.equal(found.pixels, expected.pixels)
    assert len(tried) == 1
    assert torch.equal(view.queries.forwards, plain.queries.forwards)


@pytest.mark.usefixtures("as_if_on_a_gpu")
def test_a_batch_that_shrank_and_a_short_run_are_queried_as_usual(conv: Wrapped) -> None:
    view, _, images, labels = views(conv)
    tape = Tape()
    short, long = ReplayedGradient(LOSSES["ce"], WORTH - 1, tape), ReplayedGradient(LOSSES["ce"], WORTH, tape)
    part = view.select(torch.arange(2))
    for _ in range(WARM + 2):
        short(view, images, Criterion(labels))
        long(part, images[:2], Criterion(labels[:2]))
    assert tape.captures == 0


@pytest.mark.parametrize("name", ["pgd", "apgd-ce"])
def test_nothing_is_captured_on_the_cpu(name: str, conv: Wrapped, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("captured")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", never)
    images, labels, ids = labelled(conv, SHAPE, COUNT)
    view = View(conv, ImageRng(0, ids), width=2, stop=False)
    ATTACKS.create(name, steps=WORTH)(view, images, labels, Threat("linf", 0.01))
    assert int(view.queries.backwards.min()) == WORTH


class OnGpu:
    """What the rule asks of a CUDA tensor."""

    is_cuda = True

    def __len__(self) -> int:
        return COUNT


def test_only_a_plain_query_of_a_full_batch_is_replayable(conv: Wrapped) -> None:
    view, _, images, labels = views(conv)
    criterion, there = Criterion(labels), OnGpu()
    assert replayable(view, there, criterion)  # type: ignore[arg-type]
    assert not replayable(view, images, criterion)
    assert not replayable(view, there, Criterion(labels, reference=Outputs(images)))  # type: ignore[arg-type]
    view.samples = 2
    assert not replayable(view, there, criterion)  # type: ignore[arg-type]
    view.samples, view.width = 1, COUNT + 1
    assert not replayable(view, there, criterion)  # type: ignore[arg-type]
    view.width = COUNT
    view.pipeline.stochastic = True
    assert not replayable(view, there, criterion)  # type: ignore[arg-type]
