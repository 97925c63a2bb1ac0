"""torchattacks by name: what it says of itself, what it cannot do to the caller, and the pitfalls that are guarded."""

from __future__ import annotations

import builtins
import random
import sys
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from tests.attacks.conftest import Wrapped, convolutional, labelled, linear
from vlmdefend.attacks import ATTACKS, external
from vlmdefend.attacks.composite.worst_of import WorstOf
from vlmdefend.attacks.external import External
from vlmdefend.attacks.gradient.pgd import Pgd
from vlmdefend.attacks.view import View
from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng
from vlmdefend.types import Outputs, Threat

SHAPE = (3, 8, 8)
EPS = {"linf": 8 / 255, "l2": 0.3}
SOME = [
    "CW",
    "DIFGSM",
    "PGD",
    "PIFGSM",
    "FAB",
    "Square:n_queries=20",
    "AutoAttack",
    "APGDT:steps=3",
    "DeepFool",
    "SPSA",
]


def attack(text: str, model: Wrapped, images: Tensor, labels: Tensor, ids: list[str], threat: Threat, **view: Any):  # type: ignore[no-untyped-def]
    return ATTACKS.create(f"torchattacks:{text}")(View(model, ImageRng(0, ids), **view), images, labels, threat)


# names and options


def test_name_options_and_spec() -> None:
    made = ATTACKS.create("torchattacks:difgsm:steps=20:alpha=1/255:random-start=yes")
    assert made.name == "torchattacks:DIFGSM"
    assert made.spec() == {
        "alpha": 1 / 255,
        "decay": 0.0,
        "diversity_prob": 0.5,
        "random_start": True,
        "resize_rate": 0.9,
        "steps": 20,
    }
    assert ATTACKS.create(made.name, **made.spec()) == made
    assert hash(made) == hash(ATTACKS.create(made.name, **made.spec()))
    assert made.norms == ("linf",)
    assert ATTACKS.create("torchattacks:CW").norms == ("l2",)
    assert ATTACKS.create("torchattacks:Square").gradient_free


def test_it_goes_inside_wrappers() -> None:
    made = ATTACKS.create("worst-of:attacks=[torchattacks:CW:steps=3]+cw")
    assert isinstance(made, WorstOf)
    assert made.inner[0] == External(attack="CW", options=(("steps", 3),))
    assert ATTACKS.create(made.name, **made.spec()) == made


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("torchattacks:CWW", "did you mean 'CW'"),
        ("torchattacks", "Known: APGD, "),
        ("torchattacks:JSMA", "one in L0"),
        ("torchattacks:MultiAttack", "unknown attack of torchattacks"),
        ("torchattacks:CW:stepz=3", "did you mean 'steps'"),
        ("torchattacks:PGD:eps=8/255", "unknown option of torchattacks:PGD 'eps'"),
        ("torchattacks:PGD:steps=many", "not a number"),
        ("torchattacks:PGD:random_start=perhaps", "not yes or no"),
    ],
)
def test_what_cannot_be_built_is_refused_in_a_sentence(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ATTACKS.create(text)


def test_every_listed_name_is_a_class_of_the_package() -> None:
    import torchattacks

    for name in external.names():
        assert isinstance(getattr(torchattacks, name), type)
        assert ATTACKS.create(f"torchattacks:{name}").spec() is not None


def test_without_the_package_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "torchattacks":
            raise ModuleNotFoundError("No module named 'torchattacks'")
        return plain(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "torchattacks", raising=False)
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError, match="pip install torchattacks"):
        ATTACKS.create("torchattacks:PGD")
    assert ATTACKS.create("pgd") == Pgd()


# what it must not do


@pytest.mark.parametrize("text", SOME)
def test_nothing_but_the_result_changes(text: str, conv: Wrapped) -> None:
    images, labels, ids = labelled(conv, SHAPE, 5)
    before = images.clone()
    conv.body[2].train()  # a mix of flags, which their own guard would flip; of a module that does not care
    training, requires = [m.training for m in conv.modules()], [p.requires_grad for p in conv.parameters()]
    states = torch.random.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy()
    norm = "linf" if "linf" in ATTACKS.create(f"torchattacks:{text}").norms else "l2"
    with torch.no_grad():
        found = attack(text, conv, images, labels, ids, Threat(norm, EPS[norm]), width=3, stop=False)
    assert torch.equal(images, before)
    assert all(p.grad is None for p in conv.parameters())
    assert [m.training for m in conv.modules()] == training
    assert [p.requires_grad for p in conv.parameters()] == requires
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (numpy.random.get_state()[1] == states[2]).all()
    assert (Threat(norm, EPS[norm]).distance(found.images, images) <= EPS[norm] + 1e-6).all()
    assert found.outside == 0
    assert (found.images != images).any()


@pytest.mark.parametrize("text", SOME)
def test_the_same_seed_gives_the_same_images(text: str, conv: Wrapped) -> None:
    images, labels, ids = labelled(conv, SHAPE, 5)
    norm = "linf" if "linf" in ATTACKS.create(f"torchattacks:{text}").norms else "l2"
    threat = Threat(norm, EPS[norm])
    one, two = (attack(text, conv, images, labels, ids, threat, stop=False).images for _ in range(2))
    assert torch.equal(one, two)


def test_another_seed_gives_other_noise(conv: Wrapped) -> None:
    images, labels, ids = labelled(conv, SHAPE, 5)
    threat, made = Threat("linf", EPS["linf"]), ATTACKS.create("torchattacks:PGD:steps=1:alpha=1/255")
    one, two = (made.perturb(v, images, labels, threat, v.rng) for v in (View(conv, ImageRng(s, ids)) for s in (0, 1)))
    assert not torch.equal(one, two)


# what it does


def test_it_is_their_attack_to_the_bit(conv: Wrapped) -> None:
    import torchattacks

    images, labels, ids = labelled(conv, SHAPE, 8)
    logits_only = nn.Sequential(conv.body, conv.head).eval()
    theirs = torchattacks.MIFGSM(logits_only, eps=EPS["linf"], alpha=1 / 255, steps=5)(images, labels)
    view = View(conv, ImageRng(0, ids))
    made = ATTACKS.create("torchattacks:MIFGSM:steps=5:alpha=1/255")
    ours = made.perturb(view, images, labels, Threat("linf", EPS["linf"]), view.rng)
    assert torch.equal(ours, theirs)
    assert view.queries.backwards.tolist() == view.queries.forwards.tolist() == [5] * 8


def test_cw_is_not_void_where_logits_are_negative() -> None:
    import torchattacks

    model = convolutional(seed=9)
    model.shift = -100.0
    images, labels, ids = labelled(model, SHAPE, 8)

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x).logits

    bare = torchattacks.CW(Logits().eval())(images, labels)
    assert torch.equal(model(bare).logits.argmax(1), labels)  # the fault
    assert attack("CW", model, images, labels, ids, Threat("l2", 0.6)).fooled.any()


def test_what_minimal_norm_attacks_find_outside_the_ball_is_projected(conv: Wrapped) -> None:
    images, labels, ids = labelled(conv, SHAPE, 6)
    found = attack("CW:c=10", conv, images, labels, ids, Threat("l2", 0.01), stop=False)
    assert found.outside == 0
    assert (Threat("l2", 0.01).distance(found.images, images) <= 0.01 + 1e-6).all()
    assert (found.images != images).any()


def test_one_radius_per_image(conv: Wrapped) -> None:
    images, labels, ids = labelled(conv, SHAPE, 6)
    radii = torch.tensor([0.0, 0.02, 0.01, 0.02, 0.0, 0.01])
    found = attack("PGD", conv, images, labels, ids, Threat("linf", radii), stop=False, width=2)
    distance = Threat("linf", radii).distance(found.images, images)
    assert (distance <= radii + 1e-6).all()
    assert torch.equal(distance > 0, radii > 0)


@pytest.mark.parametrize("text", ["AutoAttack", "APGDT", "APGD:loss=dlr"])
def test_too_few_classes_are_refused_in_a_sentence(text: str) -> None:
    model = linear(SHAPE, 2)
    images, labels, ids = labelled(model, SHAPE, 2)
    with pytest.raises(UserError, match="the model has 2"):
        attack(text, model, images, labels, ids, Threat("linf", 0.01))


def test_targets_are_nine_at_most() -> None:
    model = linear(SHAPE, 40)
    images, labels, ids = labelled(model, SHAPE, 2)
    view = View(model, ImageRng(0, ids), stop=False)
    ATTACKS.create("torchattacks:APGDT:steps=1").perturb(view, images, labels, Threat("linf", 1e-6), view.rng)
    assert int(view.queries.backwards.max()) == 9 * 2


def test_a_random_pipeline_and_draws_per_query(conv: Wrapped) -> None:
    class Noisy(Wrapped):
        stochastic = True

        def forward(self, images: Tensor, rng: ImageRng | None = None) -> Outputs:
            assert rng is not None
            assert len(rng) == len(images)
            return Wrapped.forward(self, images + 0.05 * rng.normal(images.shape[1:]), rng)

    images, labels, ids = labelled(conv, SHAPE, 4)
    conv.__class__ = Noisy
    view = View(conv, ImageRng(0, ids), samples=3, stop=False)
    ATTACKS.create("torchattacks:EOTPGD:steps=2").perturb(view, images, labels, Threat("linf", 0.05), view.rng)
    assert view.queries.backwards.tolist() == [2 * 2 * 3] * 4


def test_a_cut_gradient_is_a_zero_gradient_and_is_counted(conv: Wrapped) -> None:
    class Cut(Wrapped):
        def forward(self, images: Tensor, rng: ImageRng | None = None) -> Outputs:
            return Outputs(Wrapped.forward(self, images, rng).logits.detach())

    images, labels, ids = labelled(conv, SHAPE, 4)
    conv.__class__ = Cut
    view = View(conv, ImageRng(0, ids))
    ATTACKS.create("torchattacks:PGD")(view, images, labels, Threat("linf", 0.05))
    assert int(view.queries.zero_gradients) == view.queries.gradient_values > 0
