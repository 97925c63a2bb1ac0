"""Views count what is asked; slots decide every image once; BPDA has one tensor's values, another's gradient."""

from __future__ import annotations

import pytest
import torch

from tests.attacks.conftest import Wrapped, labelled
from vlmdefend.attacks.adaptive import bpda
from vlmdefend.attacks.goal import Goal
from vlmdefend.attacks.losses import LOSSES
from vlmdefend.attacks.slots import State, run_in_slots
from vlmdefend.attacks.view import View
from vlmdefend.rng import ImageRng
from vlmdefend.types import Outputs


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

    run_in_slots(total, width, lambda index: index.clone(), start, step)
    assert torch.equal(counts, needed)
    assert sorted(finished) == list(range(total))


def test_gradient_is_autograds_and_is_counted_per_image(conv: Wrapped) -> None:
    images, labels, ids = labelled(conv, (3, 8, 8), 6)
    view = View(conv, ImageRng(0, ids), width=4)
    some = torch.tensor([1, 4])
    found = view.select(some).gradient(images[some], Goal(labels[some]), LOSSES["ce"])
    pixels = images[some].clone().requires_grad_(True)
    loss = torch.nn.functional.cross_entropy(conv(pixels).logits, labels[some], reduction="sum")
    assert torch.allclose(found.pixels, torch.autograd.grad(loss, pixels)[0], atol=1e-7)
    view(images)
    assert view.ledger.forwards.tolist() == [1, 2, 1, 1, 2, 1]
    assert view.ledger.backwards.tolist() == [0, 1, 0, 0, 1, 0]


def test_samples_average_logits_and_gradients_over_fresh_draws(conv: Wrapped) -> None:
    images, labels, ids = labelled(conv, (3, 8, 8), 3)
    conv.__class__ = Noisy
    view = View(conv, ImageRng(0, ids), samples=4, stop=False)
    found = view.gradient(images, Goal(labels), LOSSES["ce"])
    draws = ImageRng(0, ids).child("pipeline")
    gradients, logits = [], []
    for _ in range(4):
        pixels = images.clone().requires_grad_(True)
        out = conv(pixels, draws)
        loss = LOSSES["ce"](out, Goal(labels)).sum()
        gradients.append(torch.autograd.grad(loss, pixels)[0])
        logits.append(out.logits.detach())
    assert torch.allclose(found.pixels, torch.stack(gradients).mean(0), atol=1e-6)
    assert torch.allclose(found.logits, torch.stack(logits).mean(0), atol=1e-5)
    assert view.ledger.backwards.tolist() == [4, 4, 4]


def test_the_detector_term_pushes_the_score_down(conv: Wrapped) -> None:
    class Detecting(Wrapped):
        def forward(self, images: torch.Tensor, rng: ImageRng | None = None) -> Outputs:
            plain = Wrapped.forward(self, images, rng)
            return Outputs(plain.logits.detach(), plain.features, images.flatten(1).sum(1))

    images, labels, ids = labelled(conv, (3, 8, 8), 2)
    conv.__class__ = Detecting
    pushed = View(conv, ImageRng(0, ids), detector_weight=0.5).gradient(images, Goal(labels), LOSSES["ce"])
    assert torch.allclose(pushed.pixels, torch.full_like(images, -0.5))
    plain = View(conv, ImageRng(0, ids)).gradient(images, Goal(labels), LOSSES["ce"])
    assert (plain.pixels == 0).all()


def test_bpda_has_the_exact_values_and_the_stand_ins_gradient() -> None:
    x = torch.rand(2, 3, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    rounded = bpda(lambda t: (t * 255).round() / 255)(x)
    assert torch.equal(rounded, (x.detach() * 255).round() / 255)
    assert torch.equal(torch.autograd.grad(rounded.sum(), x)[0], torch.ones_like(x))
    doubled = bpda(torch.sign, lambda t: 2 * t)(x)
    assert torch.equal(doubled, torch.sign(x.detach()))
    assert torch.equal(torch.autograd.grad(doubled.sum(), x)[0], torch.full_like(x, 2.0))
