"""Views count queries; the active set decides every image once; BPDA has one tensor's values, another's gradient."""

from __future__ import annotations

import math

import pytest
import torch

from tests.attacks.conftest import Wrapped, labelled
from vlmdefend.attacks.active_set import State, run_active_set
from vlmdefend.attacks.bpda import bpda
from vlmdefend.attacks.criterion import Criterion
from vlmdefend.attacks.gradient.pgd import Pgd
from vlmdefend.attacks.losses import LOSSES
from vlmdefend.attacks.view import View
from vlmdefend.rng import ImageRng
from vlmdefend.types import Outputs, Threat


class Noisy(Wrapped):
    """Adds a draw per image to the pixels: a random pipeline."""

    stochastic = True

    def forward(self, images: torch.Tensor, rng: ImageRng | None = None) -> Outputs:
        assert rng is not None
        return Wrapped.forward(self, images + 0.05 * rng.normal(images.shape[1:]), rng)


@pytest.mark.parametrize(("total", "width"), [(1, 4), (4, 4), (11, 4), (9, 1), (0, 3)])
def test_slots_decide_every_image_once_and_never_hold_more_than_the_width(total: int, width: int) -> None:
    needed = torch.randint(1, 6, (total,), generator=torch.Generator().manual_seed(total))
    counts = torch.zeros(total, dtype=torch.int64)
    finished: list[int] = []

    def start(index: torch.Tensor) -> State:
        return {"left": needed[index].clone(), "me": index.clone()}

    def step(part: torch.Tensor, index: torch.Tensor, state: State) -> torch.Tensor:
        assert len(index) <= width
        assert torch.equal(part, index)
        assert torch.equal(state["me"], index)
        counts[index] += 1
        state["left"] -= 1
        done = state["left"] == 0
        finished.extend(index[done].tolist())
        return done

    run_active_set(total, width, lambda index: index.clone(), start, step)
    assert torch.equal(counts, needed)
    assert sorted(finished) == list(range(total))


def test_gradient_is_autograds_and_is_counted_per_image(conv: Wrapped) -> None:
    images, labels, ids = labelled(conv, (3, 8, 8), 6)
    view = View(conv, ImageRng(0, ids), width=4)
    some = torch.tensor([1, 4])
    found = view.select(some).gradient(images[some], Criterion(labels[some]), LOSSES["ce"])
    pixels = images[some].clone().requires_grad_(True)
    loss = torch.nn.functional.cross_entropy(conv(pixels).logits, labels[some], reduction="sum")
    assert torch.allclose(found.pixels, torch.autograd.grad(loss, pixels)[0], atol=1e-7)
    view(images)
    assert view.queries.forwards.tolist() == [1, 2, 1, 1, 2, 1]
    assert view.queries.backwards.tolist() == [0, 1, 0, 0, 1, 0]


def test_samples_average_logits_and_gradients_over_fresh_draws(conv: Wrapped) -> None:
    images, labels, ids = labelled(conv, (3, 8, 8), 3)
    conv.__class__ = Noisy
    view = View(conv, ImageRng(0, ids), samples=4, stop=False)
    found = view.gradient(images, Criterion(labels), LOSSES["ce"])
    draws = ImageRng(0, ids).child("pipeline")
    gradients, logits = [], []
    for _ in range(4):
        pixels = images.clone().requires_grad_(True)
        out = conv(pixels, draws)
        loss = LOSSES["ce"](out, Criterion(labels)).sum()
        gradients.append(torch.autograd.grad(loss, pixels)[0])
        logits.append(out.logits.detach())
    assert torch.allclose(found.pixels, torch.stack(gradients).mean(0), atol=1e-6)
    assert torch.allclose(found.logits, torch.stack(logits).mean(0), atol=1e-5)
    assert view.queries.backwards.tolist() == [4, 4, 4]


def test_the_detector_term_pushes_the_score_down(conv: Wrapped) -> None:
    class Detecting(Wrapped):
        def forward(self, images: torch.Tensor, rng: ImageRng | None = None) -> Outputs:
            plain = Wrapped.forward(self, images, rng)
            return Outputs(plain.logits.detach(), plain.features, images.flatten(1).sum(1))

    images, labels, ids = labelled(conv, (3, 8, 8), 2)
    conv.__class__ = Detecting
    pushed = View(conv, ImageRng(0, ids), detector_weight=0.5).gradient(images, Criterion(labels), LOSSES["ce"])
    assert torch.allclose(pushed.pixels, torch.full_like(images, -0.5))
    plain = View(conv, ImageRng(0, ids)).gradient(images, Criterion(labels), LOSSES["ce"])
    assert (plain.pixels == 0).all()


class Scoring(Wrapped):
    """The detector's score is the mean pixel."""

    def forward(self, images: torch.Tensor, rng: ImageRng | None = None) -> Outputs:
        return Wrapped.forward(self, images, rng)._replace(detector_score=images.flatten(1).mean(1))


@pytest.mark.parametrize("samples", [1, 3])
def test_with_labels_the_view_ranks_what_fools_by_the_detectors_quiet(conv: Wrapped, samples: int) -> None:
    images, right, ids = labelled(conv, (3, 8, 8), 6)
    labels = torch.where(torch.arange(6) < 3, (right + 1) % 5, right)  # the first three are fooled as they are
    plain = Criterion(labels).margin(conv(images).logits.detach())
    conv.__class__ = Scoring
    view = View(conv, ImageRng(0, ids), width=4, samples=samples, labels=labels)
    expected = torch.where(plain > 0, 2 - images.flatten(1).mean(1).atan(), plain)
    assert (plain > 0).tolist() == [True, True, True, False, False, False]
    assert torch.allclose(Criterion(labels).margin(view(images)), expected, atol=1e-4)
    some = torch.tensor([1, 5])
    found = view.select(some).gradient(images[some], Criterion(labels[some]), LOSSES["ce"])
    assert torch.allclose(Criterion(labels[some]).margin(found.logits), expected[some], atol=1e-4)
    bare = View(conv, ImageRng(0, ids)).select(some).gradient(images[some], Criterion(labels[some]), LOSSES["ce"])
    assert torch.allclose(found.pixels, bare.pixels, atol=1e-6)  # what is climbed stays


def test_pgd_goes_on_to_the_quietest_of_the_iterates_that_fool() -> None:
    """Class 0 below a mean of 1/2, and the detector likes bright images: every step beyond the first to fool is worse.

    A step up is 0.05 of the mean, so of the starts at 0.47 the first iterate above 1/2 is at 0.52.
    """

    class Bright(Wrapped):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            self.num_classes = 2

        def forward(self, images: torch.Tensor, rng: ImageRng | None = None) -> Outputs:
            mean = images.flatten(1).mean(1)
            return Outputs(torch.stack([0.5 - mean, mean - 0.5], dim=1), detector_score=mean)

    images, labels, threat = torch.full((2, 3, 4, 4), 0.47), torch.zeros(2, dtype=torch.int64), Threat("linf", 0.2)
    attack = Pgd(steps=4, alpha="0.05", random_start=False)
    quiet = View(Bright(), ImageRng(0, ["a", "b"]), stop=False, labels=labels)
    loud = View(Bright(), ImageRng(0, ["a", "b"]), stop=False)
    assert torch.allclose(attack(quiet, images, labels, threat).images, torch.tensor(0.52), atol=1e-5)
    assert torch.allclose(attack(loud, images, labels, threat).images, torch.tensor(0.67), atol=1e-5)


def test_an_infinite_weight_climbs_the_quiet_where_it_fools_and_the_loss_elsewhere(conv: Wrapped) -> None:
    images, right, ids = labelled(conv, (3, 8, 8), 2)
    labels = torch.stack([(right[0] + 1) % 5, right[1]])  # fooled, not fooled
    conv.__class__ = Scoring
    found = View(conv, ImageRng(0, ids), detector_weight=math.inf).gradient(images, Criterion(labels), LOSSES["ce"])
    plain = View(conv, ImageRng(0, ids)).gradient(images, Criterion(labels), LOSSES["ce"])
    assert torch.allclose(found.pixels[0], torch.tensor(-1 / 192), atol=1e-8)
    assert torch.allclose(found.pixels[1], plain.pixels[1], atol=1e-7)


def test_bpda_has_the_exact_values_and_the_surrogates_gradient() -> None:
    x = torch.rand(2, 3, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    rounded = bpda(lambda t: (t * 255).round() / 255)(x)
    assert torch.equal(rounded, (x.detach() * 255).round() / 255)
    assert torch.equal(torch.autograd.grad(rounded.sum(), x)[0], torch.ones_like(x))
    doubled = bpda(torch.sign, lambda t: 2 * t)(x)
    assert torch.equal(doubled, torch.sign(x.detach()))
    assert torch.equal(torch.autograd.grad(doubled.sum(), x)[0], torch.full_like(x, 2.0))
