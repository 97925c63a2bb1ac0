"""Auto-PGD against closed forms and against the authors' code, whose iterates it must equal."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor, nn

from tests.attacks.conftest import Wrapped, convolutional, labelled, linear
from tests.attacks.gradient.test_pgd import minimal_radius
from vlmdefend.attacks import ATTACKS
from vlmdefend.attacks.best_iterates import likely_wrong
from vlmdefend.attacks.gradient import _apgd
from vlmdefend.attacks.gradient._apgd import checkpoints
from vlmdefend.attacks.view import View
from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng, opaque
from vlmdefend.types import Outputs, Threat

pytestmark = pytest.mark.numerics

NAMES = ["apgd-ce", "apgd-dlr", "apgd-t"]
SHAPE = (3, 8, 8)


class Recording(nn.Module):
    """Keeps every batch of images that asks for a gradient."""

    stochastic = False

    def __init__(self, model: Wrapped) -> None:
        super().__init__()
        self.model, self.num_classes = model, model.num_classes
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor, rng: ImageRng | None = None) -> Outputs | Tensor:
        if images.requires_grad:
            self.seen.append(images.detach().clone())
        outputs = self.model(images)
        return outputs.logits if rng is None else outputs


def test_checkpoints_are_those_of_the_paper() -> None:
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(1) == [1]
    assert all(later > earlier for later, earlier in zip(checkpoints(37)[1:], checkpoints(37), strict=False))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("shape", [(8,), (4, 6), SHAPE])
@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("name", NAMES)
def test_reaches_the_known_minimum_of_a_linear_model(name: str, norm: str, shape: tuple[int, ...], count: int) -> None:
    model = linear(shape, 4)
    images, labels, ids = labelled(model, shape, count)
    radius = minimal_radius(model, images, labels, norm)
    reachable = radius * 1.25 < 0.2  # the box [0, 1] is no obstacle within the images' margin of 0.2
    attack = ATTACKS.create(name, steps=40)
    over = attack(View(model, ImageRng(0, ids)), images, labels, Threat(norm, radius * 1.25))
    assert over.fooled[reachable].all()
    under = attack(View(model, ImageRng(0, ids)), images, labels, Threat(norm, radius * 0.98))
    assert not under.fooled.any()


@pytest.mark.parametrize("eps", {"linf": (2 / 255, 8 / 255), "l2": (0.1, 0.5)}.items(), ids=["linf", "l2"])
@pytest.mark.parametrize("seed", [7, 9])
@pytest.mark.parametrize("name", NAMES)
def test_iterates_equal_the_authors_code(
    name: str, seed: int, eps: tuple[str, tuple[float, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All 100 iterates from one start are equal bit for bit; so is the verdict."""
    base = importlib.import_module("pyautoattack.autopgd_base")
    model = convolutional(seed=seed)
    images, labels, ids = labelled(model, SHAPE, 16)
    places = {opaque(image): i for i, image in enumerate(ids)}
    for radius in eps[1]:
        theirs, ours = Recording(model), Recording(model)
        options = {"n_iter": 100, "norm": {"linf": "Linf", "l2": "L2"}[eps[0]], "eps": radius, "seed": seed}
        if name == "apgd-t":
            reference = base.APGDAttack_targeted(theirs, **options, n_target_classes=1)
        else:
            reference = base.APGDAttack(theirs, **options, n_restarts=1, loss=name.removeprefix("apgd-"))
        state = torch.random.get_rng_state()
        found = reference.perturb(images, labels)
        torch.random.set_rng_state(state)
        injected = theirs.seen[0]
        monkeypatch.setattr(
            _apgd, "start_point", lambda x, t, rng, s=injected: s[[places[i] for i in rng.names]].clone()
        )
        attack = ATTACKS.create(name, **({"targets": 1} if name == "apgd-t" else {}))
        view = View(ours, ImageRng(0, ids), width=16, stop=False)
        result = attack(view, images, labels, Threat(eps[0], radius))
        assert len(ours.seen) == 100
        assert len(theirs.seen) == 101
        assert all(torch.equal(a, b) for a, b in zip(ours.seen, theirs.seen, strict=False))
        with torch.no_grad():
            assert torch.equal(result.fooled, model(found).logits.argmax(1) != labels)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_active_set_fools_the_same_images_as_the_fixed_batch(name: str, norm: str) -> None:
    model = convolutional(seed=9)
    images, labels, ids = labelled(model, SHAPE, 30)
    threat = Threat(norm, {"linf": 3 / 255, "l2": 0.15}[norm])
    attack = ATTACKS.create(name, steps=16)
    one = attack(View(model, ImageRng(0, ids), width=8), images, labels, threat)
    two = attack(View(model, ImageRng(0, ids), width=8, stop=False), images, labels, threat)
    assert torch.equal(one.fooled, two.fooled)
    assert 0 < int(one.fooled.sum()) < 30
    forwards, backwards = attack.budget()
    classes = 4 / 9 if name == "apgd-t" else 1  # the budget is for 9 targets, the model has 4 wrong classes
    assert int(one.steps.sum()) < int(two.steps.sum()) == 30 * backwards * classes
    assert forwards > backwards


@pytest.mark.parametrize("name", NAMES)
def test_more_restarts_never_help_the_model(name: str) -> None:
    model = convolutional(seed=9)
    images, labels, ids = labelled(model, SHAPE, 40)
    threat = Threat("linf", 1.5 / 255)
    one = ATTACKS.create(name, steps=4)(View(model, ImageRng(0, ids)), images, labels, threat)
    four = ATTACKS.create(name, steps=4, restarts=4)(View(model, ImageRng(0, ids)), images, labels, threat)
    assert (four.fooled | ~one.fooled).all()


def test_likely_wrong_classes_leave_the_label_out() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0, 0.0], [0.0, 3.0, 1.0, 2.0]])
    ranked = likely_wrong(logits, torch.tensor([0, 3]), 9)
    assert ranked.tolist() == [[2, 1, 3], [1, 2, 0]]


@pytest.mark.parametrize(("name", "classes"), [("apgd-dlr", 2), ("apgd-t", 2), ("apgd-t", 3)])
def test_too_few_classes_are_refused_in_a_sentence(name: str, classes: int) -> None:
    model = linear((8,), classes)
    images, labels, ids = labelled(model, (8,), 3)
    with pytest.raises(UserError, match=f"the model has {classes}"):
        ATTACKS.create(name)(View(model, ImageRng(0, ids)), images, labels, Threat("linf", 0.1))


def test_two_classes_are_enough_for_the_cross_entropy() -> None:
    model = linear((8,), 2)
    images, labels, ids = labelled(model, (8,), 3)
    found = ATTACKS.create("apgd-ce")(View(model, ImageRng(0, ids)), images, labels, Threat("linf", 0.6))
    assert found.fooled.any()


def test_a_gradient_that_is_not_finite_moves_nothing_out_of_the_ball(conv: Wrapped) -> None:
    class Broken(Wrapped):
        def forward(self, images, rng=None):  # type: ignore[no-untyped-def]
            return Outputs(*[t * torch.nan for t in Wrapped.forward(self, images, rng)[:2]])

    images, labels, ids = labelled(conv, SHAPE, 3)
    conv.__class__ = Broken
    for norm in ("linf", "l2"):
        found = ATTACKS.create("apgd-ce", steps=5)(
            View(conv, ImageRng(0, ids), stop=False), images, labels, Threat(norm, 0.1)
        )
        assert found.outside == 0


@pytest.mark.parametrize("options", [{"steps": 0}, {"restarts": 0}, {"rho": 1.5}])
def test_wrong_options_are_refused(options: dict[str, float]) -> None:
    for name in NAMES:
        with pytest.raises(UserError, match=next(iter(options))):
            ATTACKS.create(name, **options)


@pytest.mark.parametrize("name", ["apgd-ce", "fab-t"])
def test_of_a_random_pipeline_the_last_iterate_counts_and_not_the_luckiest(name: str) -> None:
    class Noisy(Wrapped):
        stochastic = True

        def forward(self, images, rng=None):  # type: ignore[no-untyped-def]
            noise = rng.normal((self.num_classes,)) * 5.0
            outputs = Wrapped.forward(self, images, rng)
            self.last = images.detach().clone()
            return Outputs(outputs.logits + noise, outputs.features)

    model = convolutional(seed=9)
    images, labels, ids = labelled(model, SHAPE, 3)
    model.__class__ = Noisy
    view = View(model, ImageRng(0, ids), stop=False)
    options = {"steps": 6} if name == "apgd-ce" else {"steps": 6, "targets": 1}
    found = ATTACKS.create(name, **options).perturb(view, images, labels, Threat("linf", 2 / 255), view.rng)
    assert all(any(torch.equal(image, last) for last in model.last) for image in found)
