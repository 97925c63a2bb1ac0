"""AutoAttack: its members, in order, each on what is still robust."""

from __future__ import annotations

import pytest
import torch

from tests.attacks.conftest import Wrapped, convolutional, labelled, linear
from vlmdefend.attacks import ATTACKS
from vlmdefend.attacks.base import Attack
from vlmdefend.attacks.composite.autoattack import AutoAttack
from vlmdefend.attacks.view import View
from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng, opaque
from vlmdefend.types import Outputs, Threat

pytestmark = pytest.mark.numerics

SHAPE = (3, 8, 8)
COMPOSITION = {
    "standard": ["apgd-ce", "apgd-t", "fab-t", "square"],
    "rand": ["apgd-ce", "apgd-dlr"],
    "fare": ["apgd-ce", "apgd-t"],
    "tecoa": ["apgd-ce", "apgd-dlr"],
}


@pytest.mark.parametrize("version", COMPOSITION)
def test_a_version_is_its_members_each_on_the_images_still_robust(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, list[str]]] = []
    plain = Attack.__call__

    def watched(self: Attack, view: View, images, labels, threat):  # type: ignore[no-untyped-def]
        calls.append((self.name, view.rng.names))
        return plain(self, view, images, labels, threat)

    monkeypatch.setattr(Attack, "__call__", watched)
    model = convolutional(seed=9)
    images, labels, ids = labelled(model, SHAPE, 20)
    threat = Threat("linf", 1.5 / 255)
    attack = AutoAttack(version=version, steps=10, queries=50)
    found = attack(View(model, ImageRng(0, ids)), images, labels, threat)
    assert [name for name, _ in calls] == ["autoattack", *COMPOSITION[version]]
    robust = ids
    for member, (_, given) in zip(attack.members(5), calls[1:], strict=True):
        assert given == [opaque(i) for i in robust]
        index = torch.tensor([ids.index(i) for i in robust])
        alone = plain(member, View(model, ImageRng(0, ids)).select(index), images[index], labels[index], threat)
        robust = [i for i, fooled in zip(robust, alone.fooled, strict=True) if not fooled]
    assert [i for i, fooled in zip(ids, found.fooled, strict=True) if not fooled] == robust
    assert 0 < len(robust) < 20


def test_the_default_members_are_those_of_the_paper() -> None:
    ce, t, fab, square = AutoAttack().members()
    assert ce == ATTACKS.create("apgd-ce", steps=100, restarts=1)
    assert t == ATTACKS.create("apgd-t", steps=100, targets=9)
    assert fab == ATTACKS.create("fab-t", steps=100, targets=9)
    assert square == ATTACKS.create("square", queries=5000, p_init=0.8, rescale=False)


@pytest.mark.parametrize(
    ("version", "classes", "left", "out"),
    [
        ("standard", 2, ["apgd-ce", "fab-t", "square"], "apgd-t"),
        ("standard", 3, ["apgd-ce", "fab-t", "square"], "apgd-t"),
        ("tecoa", 2, ["apgd-ce"], "apgd-dlr"),
        ("tecoa", 3, ["apgd-ce", "apgd-dlr"], None),
    ],
)
def test_members_that_need_more_classes_are_left_out_aloud(
    version: str, classes: int, left: list[str], out: str | None
) -> None:
    model = linear((1, 2, 4), classes)
    images, labels, ids = labelled(model, (1, 2, 4), 8)
    attack = AutoAttack(version=version, steps=5, queries=20)
    assert [member.name for member in attack.members(classes)] == left
    view = View(model, ImageRng(0, ids))
    if out is None:
        attack(view, images, labels, Threat("linf", 0.3))
    else:
        with pytest.warns(UserWarning, match=f"leaves out {out}"):
            attack(view, images, labels, Threat("linf", 0.3))


def test_rand_averages_20_draws_of_a_random_pipeline_and_one_of_a_fixed_one() -> None:
    class Noisy(Wrapped):
        stochastic = True

        def forward(self, images, rng=None):  # type: ignore[no-untyped-def]
            noise = rng.normal(tuple(images.shape[1:])) * 0.01
            return Outputs(*Wrapped.forward(self, images + noise, rng)[:2])

    model = convolutional(seed=9)
    images, labels, ids = labelled(model, SHAPE, 3)
    attack = AutoAttack(version="rand", steps=3)
    fixed, noisy = (View(model, ImageRng(0, ids), stop=False) for _ in range(2))
    attack(fixed, images, labels, Threat("linf", 1 / 255))
    assert fixed.queries.backwards.tolist() == [6, 6, 6]
    model.__class__ = Noisy
    attack(noisy, images, labels, Threat("linf", 1 / 255))
    assert noisy.queries.backwards.tolist() == [120, 120, 120]
    assert attack.budget()[1] == 120


def test_no_member_alone_is_stronger_and_the_budget_holds() -> None:
    model = convolutional(seed=7)
    images, labels, ids = labelled(model, SHAPE, 20)
    threat = Threat("linf", 1 / 255)
    attack = AutoAttack(steps=10, queries=50)
    view = View(model, ImageRng(0, ids))
    whole = attack(view, images, labels, threat)
    for member in attack.members():
        alone = member(View(model, ImageRng(0, ids)), images, labels, threat)
        assert (whole.fooled | ~alone.fooled).all()
    forwards, backwards = attack.budget()
    assert int(view.queries.forwards.max()) <= forwards + 2
    assert int(view.queries.backwards.max()) <= backwards


def test_wrong_options_are_refused() -> None:
    for option in ("steps", "queries"):
        with pytest.raises(UserError, match=option):
            ATTACKS.create("autoattack", **{option: 0})
    with pytest.raises(UserError, match="version"):
        ATTACKS.create("autoattack:version=plus")
