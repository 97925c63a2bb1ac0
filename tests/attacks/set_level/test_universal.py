"""One delta for the set: what it reaches, what it depends on, what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.attacks.conftest import Wrapped, convolutional, labelled, linear
from vlmdefend.attacks import ATTACKS
from vlmdefend.attacks.set_level.universal import Universal
from vlmdefend.attacks.view import View
from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng, opaque
from vlmdefend.types import Outputs, Threat

SHAPE = (3, 8, 8)


def view_of_images(model: Wrapped, count: int = 40) -> tuple[View, Tensor, Tensor]:
    images, labels, ids = labelled(model, SHAPE, count, seed=3)
    return View(model, ImageRng(0, ids), width=16), images, labels


def learned(model: Wrapped, threat: Threat, width: int = 16, seed: int = 0, **options: object) -> Universal:
    images, labels, ids = labelled(model, SHAPE, 40, seed=3)
    fitted = Universal(**options).fit(View(model, ImageRng(seed, ids), width=width), images, labels, threat)  # type: ignore[arg-type]
    assert isinstance(fitted, Universal)
    return fitted


class OneSided(Wrapped):
    """Two classes; the margin of class 1 over class 0 is the same linear function on every image."""


def one_sided() -> tuple[OneSided, Tensor]:
    model = linear(SHAPE, 2)
    weight = torch.randn(192, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        model.head.weight.copy_(torch.stack([torch.zeros(192), weight]))
        model.head.bias.copy_(torch.tensor([100.0, 0.0]))
    model.__class__ = OneSided
    return model, weight.view(SHAPE)  # type: ignore[return-value]


@pytest.mark.parametrize("loss", ["ce", "cw"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_where_all_images_agree_the_delta_is_the_known_best_one(norm: str, loss: str) -> None:
    """All have label 0 and the same gradient w: the best delta is eps sign(w), under L2 eps w / ||w||."""
    model, weight = one_sided()
    view, images, labels = view_of_images(model)
    assert (labels == 0).all()
    eps = 0.1 if norm == "linf" else 0.5
    attack = Universal(loss=loss, ceiling=None, steps=30)  # type: ignore[arg-type]
    fitted = attack.fit(view, images, labels, Threat(norm, eps))  # type: ignore[arg-type]
    best = eps * weight.sign() if norm == "linf" else eps * weight / weight.norm()
    assert torch.allclose(fitted.learned, best, atol=1e-3)  # type: ignore[attr-defined]


def test_every_image_gets_the_same_delta() -> None:
    model = convolutional()
    threat = Threat("linf", 0.1)
    fitted = learned(model, threat)
    images, labels, ids = labelled(model, SHAPE, 9, seed=8)  # in [0.2, 0.8]: nothing is clamped
    found = fitted(View(model, ImageRng(0, ids)), images, labels, threat).images - images
    assert torch.allclose(found, found[:1].expand_as(found), atol=1e-6)
    assert found.abs().amax() == pytest.approx(0.1, abs=1e-6)


@pytest.mark.parametrize("loss", ["ce", "cw", "feature"])
@pytest.mark.parametrize(("norm", "radii"), [("linf", (0.02, 0.06, 0.15)), ("l2", (0.3, 0.8, 2.0))])
def test_a_larger_radius_leaves_fewer_images_and_the_delta_beats_noise(
    norm: str, radii: tuple[float, ...], loss: str
) -> None:
    model = convolutional()
    images, labels, ids = labelled(model, SHAPE, 40, seed=3)
    fooled, noisy = [], []
    for eps in radii:
        threat = Threat(norm, eps)  # type: ignore[arg-type]
        attack = learned(model, threat, loss=loss)
        fooled.append(int(attack(View(model, ImageRng(0, ids)), images, labels, threat).fooled.sum()))
        noise = threat.random_start(images, ImageRng(0, ids, "noise"))
        with torch.no_grad():
            noisy.append(int((model(noise).logits.argmax(1) != labels).sum()))
    assert fooled == sorted(fooled)
    assert fooled[-1] > fooled[0]
    assert fooled[-1] > 2 * noisy[-1]


def test_what_is_learned_depends_on_the_seed_and_not_on_how_many_images_fit_at_once() -> None:
    model, threat = convolutional(), Threat("linf", 0.05)
    plain = learned(model, threat).learned
    assert plain is not None
    assert torch.equal(plain, learned(model, threat).learned)
    assert torch.allclose(plain, learned(model, threat, width=3).learned, atol=1e-5)  # type: ignore[arg-type]
    assert not torch.equal(plain, learned(model, threat, seed=1).learned)  # type: ignore[arg-type]


def test_an_image_that_is_lost_already_adds_nothing() -> None:
    """Of two groups that pull in opposite directions the lost one is silent below the ceiling, and wins without it."""
    model, weight = one_sided()
    view, images, _ = view_of_images(model)
    labels = torch.zeros(40, dtype=torch.int64)
    labels[:30] = 1  # wrong by a margin of about 100
    towards = []
    for ceiling in (50.0, None):
        attack = Universal(loss="cw", ceiling=ceiling, steps=20, batch=40)
        fitted = attack.fit(view, images, labels, Threat("linf", 0.05))
        towards.append(float((fitted.learned * weight).sum()))  # type: ignore[attr-defined]
    assert towards[0] > 0 > towards[1]


def test_a_smaller_ball_holds_the_projection_of_the_delta() -> None:
    model = convolutional()
    fitted = learned(model, Threat("linf", 0.1))
    images, labels, ids = labelled(model, SHAPE, 4)
    found = fitted(View(model, ImageRng(0, ids)), images, labels, Threat("linf", 0.02)).images - images
    assert fitted.learned is not None
    assert torch.allclose(found, fitted.learned.clamp(-0.02, 0.02).expand_as(found), atol=1e-6)


def test_it_says_to_fit_first_and_refuses_images_of_another_size() -> None:
    model, threat = convolutional(), Threat("linf", 0.1)
    images, labels, ids = labelled(model, SHAPE, 3)
    with pytest.raises(UserError, match=r"call fit\(view, images, labels, threat\) first"):
        Universal()(View(model, ImageRng(0, ids)), images, labels, threat)
    fitted = learned(model, threat)
    small = linear((3, 6, 6), 5)
    images, labels, ids = labelled(small, (3, 6, 6), 3)
    with pytest.raises(UserError, match=r"learned from images \(3, 8, 8\) and was given \(3, 6, 6\)"):
        fitted(View(small, ImageRng(0, ids)), images, labels, threat)
    with pytest.raises(UserError, match="no image to learn from"):
        Universal().fit(View(model, ImageRng(0, [])), torch.zeros(0, *SHAPE), torch.zeros(0).long(), threat)


def test_what_was_learned_is_no_option() -> None:
    fitted = learned(convolutional(), Threat("linf", 0.1), steps=2)
    assert fitted.spec() == Universal(steps=2).spec()
    assert fitted == Universal(steps=2)
    assert hash(fitted) == hash(Universal(steps=2))
    assert repr(fitted) == repr(Universal(steps=2))


def test_wrappers_let_it_learn() -> None:
    model, threat = convolutional(), Threat("linf", 0.1)
    images, labels, ids = labelled(model, SHAPE, 40, seed=3)
    wrapped = ATTACKS.create("worst-of:attacks=universal+fgsm")
    assert wrapped.learns_from == Universal().learns_from
    assert wrapped.fit_budget(40) == Universal().fit_budget(40) == (400, 400)
    fitted = wrapped.fit(View(model, ImageRng(0, ids)), images, labels, threat)
    both = fitted(View(model, ImageRng(0, ids)), images, labels, threat).fooled
    alone = learned(model, threat, width=64)(View(model, ImageRng(0, ids)), images, labels, threat).fooled
    assert (both | ~alone).all()


def test_the_cost_of_fitting_is_the_documented_one() -> None:
    model = convolutional()
    for loss in ("cw", "feature"):
        view, images, labels = view_of_images(model)
        attack = Universal(steps=3, loss=loss)  # type: ignore[arg-type]
        attack.fit(view, images, labels, Threat("linf", 0.1))
        spent = int(view.queries.forwards.sum()), int(view.queries.backwards.sum())
        assert spent == attack.fit_budget(40)


def test_a_gradient_that_is_not_a_number_does_not_spoil_the_fitting() -> None:
    class Broken(Wrapped):
        def forward(self, images: Tensor, rng: ImageRng | None = None) -> Outputs:
            assert rng is not None
            outputs = Wrapped.forward(self, images, rng)
            bad = torch.tensor([name == opaque("image-4") for name in rng.names])
            return Outputs(outputs.logits * torch.where(bad, torch.nan, 1.0)[:, None], outputs.features)

    model = convolutional()
    view, images, labels = view_of_images(model)
    model.__class__ = Broken
    fitted = Universal().fit(view, images, labels, Threat("linf", 0.1))
    assert fitted.learned.isfinite().all()  # type: ignore[attr-defined]
    assert fitted.learned.abs().amax() == pytest.approx(0.1)  # type: ignore[attr-defined]
