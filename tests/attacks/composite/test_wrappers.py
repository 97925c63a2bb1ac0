"""Attacks around attacks, and what is written in brackets."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.attacks.conftest import Noisy, convolutional, labelled, linear
from vlmdefend.attacks import ATTACKS
from vlmdefend.attacks.base import Attack
from vlmdefend.attacks.composite.eot import Eot
from vlmdefend.attacks.composite.repeated import Repeated
from vlmdefend.attacks.composite.targeted import Targeted
from vlmdefend.attacks.composite.worst_of import WorstOf
from vlmdefend.attacks.gradient.apgd_ce import ApgdCe
from vlmdefend.attacks.gradient.mi import Mi
from vlmdefend.attacks.gradient.pgd import Pgd
from vlmdefend.attacks.query.square import Square
from vlmdefend.attacks.set_level.universal import Universal
from vlmdefend.attacks.view import View
from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng, opaque
from vlmdefend.types import Threat

SHAPE = (3, 8, 8)


# text


@pytest.mark.parametrize(
    ("text", "built"),
    [
        ("worst-of:attacks=pgd+square", WorstOf(attacks=[Pgd(), Square()])),
        ("worst-of:attacks=[pgd:steps=20]+square", WorstOf(attacks=(Pgd(steps=20), Square()))),
        ("worst_of:attacks=[pgd]", WorstOf(attacks=Pgd())),
        ("repeated:attack=[pgd:steps=3]:n=2", Repeated(attack=Pgd(steps=3), n=2)),
        ("targeted:attack=[mi:plus=di+ti]:target=least", Targeted(attack=Mi(plus="di+ti"), target="least")),
        ("targeted:attack=apgd-ce:target=4", Targeted(attack=ApgdCe(), target=4)),
        (
            "eot:samples=3:attack=[worst-of:attacks=[mi:plus=[ti:kernel=3]+di]+square]",
            Eot(attack=WorstOf(attacks=[Mi(plus="[ti:kernel=3]+di"), Square()]), samples=3),
        ),
    ],
)
def test_text_and_objects_build_the_same_attack_and_its_spec_builds_it_again(text: str, built: Attack) -> None:
    made = ATTACKS.create(text)
    assert made == built
    assert hash(made) == hash(built)
    spec = json.loads(json.dumps(made.spec()))
    assert spec == made.spec()
    assert ATTACKS.create(made.name, **spec) == made


def test_a_spec_tells_the_options_that_were_not_written() -> None:
    spec = WorstOf(attacks="[pgd:steps=20]").spec()
    assert spec == {"attacks": "[pgd:steps=20:alpha=eps/4:loss=ce:restarts=1:random_start=True:last=False:target=None]"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("worst-of:attacks=[pgd+square", "bracket"),
        ("worst-of:attacks=pgd]+square", "bracket"),
        ("worst-of:attacks=pgd++square", "with \\+ between"),
        ("worst-of:attacks=pgd+sqare", "did you mean 'square'"),
        ("worst-of:attacks=[pgd:stepz=3]", "did you mean 'steps'"),
        ("worst-of:attacks=cw+mi:n=2", "did you mean|unknown option"),
        ("worst-of:attacks=cw+torchattacks:FGSM", "has no value|unknown"),
        ("worst-of:attacks=cw+[torchattacks:FGSM]", "no norm in common"),
        ("repeated:attack=pgd+mi", "one attack, not 2"),
        ("repeated:n=0", "n=0"),
        ("eot:samples=0", "samples=0"),
        ("targeted:attack=square", "square knows no target"),
        ("targeted:attack=[pgd:target=2]", "already"),
        ("targeted:attack=[pgd:loss=kl]", "loss=kl"),
        ("targeted:target=nearest", "target"),
    ],
)
def test_what_cannot_be_built_is_refused_in_a_sentence(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ATTACKS.create(text)


def test_a_wrapper_knows_the_norms_that_all_its_attacks_know() -> None:
    assert WorstOf(attacks="pgd+cw").norms == ("l2",)
    assert WorstOf(attacks="pgd+square").norms == ("linf", "l2")
    assert WorstOf(attacks="square").gradient_free
    assert not WorstOf(attacks="square+pgd").gradient_free
    assert not Repeated(attack=Pgd(last=True)).keeps_best
    model = convolutional()
    images, labels, ids = labelled(model, SHAPE, 2)
    with pytest.raises(UserError, match="not for linf"):
        WorstOf(attacks="pgd+cw")(View(model, ImageRng(0, ids)), images, labels, Threat("linf", 0.1))


# worst of


def test_members_run_on_survivors_and_the_best_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, list[str]]] = []
    plain = Attack.__call__

    def watched(self: Attack, view: View, images, labels, threat):  # type: ignore[no-untyped-def]
        calls.append((self.name, view.rng.names))
        return plain(self, view, images, labels, threat)

    monkeypatch.setattr(Attack, "__call__", watched)
    model = convolutional(seed=9)
    images, labels, ids = labelled(model, SHAPE, 20)
    threat = Threat("linf", 1.5 / 255)
    members = [Pgd(steps=1), Mi(steps=5), ApgdCe(steps=10)]
    found = WorstOf(attacks=members)(View(model, ImageRng(0, ids)), images, labels, threat)
    alone = [plain(member, View(model, ImageRng(0, ids)), images, labels, threat) for member in members]
    assert [name for name, _ in calls] == ["worst-of", "pgd", "mi", "apgd-ce"]
    assert calls[2][1] == [opaque(i) for i, fooled in zip(ids, alone[0].fooled, strict=True) if not fooled]
    assert torch.equal(found.fooled, alone[0].fooled | alone[1].fooled | alone[2].fooled)
    assert 0 < int(alone[0].fooled.sum()) < int(found.fooled.sum()) < 20


def test_the_worst_of_one_attack_is_that_attack() -> None:
    model = convolutional(seed=5)
    images, labels, ids = labelled(model, SHAPE, 8)
    threat = Threat("linf", 8 / 255)
    one = Pgd(steps=5)(View(model, ImageRng(0, ids), stop=False), images, labels, threat)
    wrapped = WorstOf(attacks=Pgd(steps=5))(View(model, ImageRng(0, ids), stop=False), images, labels, threat)
    assert torch.equal(one.images, wrapped.images)


def test_every_member_attacks_every_image_where_fooling_the_view_proves_nothing() -> None:
    model = convolutional(seed=5)
    images, labels, ids = labelled(model, SHAPE, 8)
    threat = Threat("linf", 16 / 255)
    view = View(model, ImageRng(0, ids), stop=False)
    found = WorstOf(attacks="[pgd:steps=4]+[mi:steps=6]")(view, images, labels, threat)
    assert (found.steps == 10).all()
    singles = [
        a(View(model, ImageRng(0, ids), stop=False), images, labels, threat) for a in (Pgd(steps=4), Mi(steps=6))
    ]
    assert torch.equal(found.margin, torch.maximum(singles[0].margin, singles[1].margin))


def test_members_learn_from_the_same_images() -> None:
    seen: list[tuple[str, int]] = []

    class Learner(Pgd):
        @property
        def learns_from(self) -> int:
            return self.steps

        def fit(self, view: View, images: Tensor, labels: Tensor, threat: Threat) -> Attack:
            seen.append(("fit", len(images)))
            return replace(self, restarts=7)

    attack = WorstOf(attacks=[Learner(steps=3), Repeated(attack=Learner(steps=5))])
    assert attack.learns_from == 5
    model = convolutional()
    images, labels, ids = labelled(model, SHAPE, 5)
    fitted = attack.fit(View(model, ImageRng(0, ids)), images, labels, Threat("linf", 0.1))
    assert seen == [("fit", 5), ("fit", 5)]
    assert fitted.inner[0].spec()["restarts"] == fitted.inner[1].inner[0].spec()["restarts"] == 7


# repeated


def test_repeats_start_from_other_numbers_and_never_help_the_model() -> None:
    model = convolutional(seed=9)
    images, labels, ids = labelled(model, SHAPE, 30)
    threat = Threat("linf", 1.5 / 255)
    margins = [
        Repeated(attack=Pgd(steps=3), n=n)(View(model, ImageRng(0, ids), stop=False), images, labels, threat).margin
        for n in (1, 4)
    ]
    assert (margins[1] >= margins[0]).all()
    assert (margins[1] > margins[0]).any()


# targeted


@pytest.mark.parametrize("name", ["fgsm", "pgd", "apgd-ce", "mi", "ni", "si"])
def test_a_target_is_the_attacks_own(name: str) -> None:
    model = linear(SHAPE, 5)
    images, labels, ids = labelled(model, SHAPE, 5)
    threat = Threat("linf", 0.02)
    quick = {} if name == "fgsm" else {"steps": 6}
    inner = ATTACKS.create(name, **quick)
    wrapped = Targeted(attack=inner, target="least")(View(model, ImageRng(0, ids)), images, labels, threat)
    own = ATTACKS.create(name, **quick, target="least")(View(model, ImageRng(0, ids)), images, labels, threat)
    free = inner(View(model, ImageRng(0, ids)), images, labels, threat)
    assert torch.equal(wrapped.images, own.images)
    assert not torch.equal(wrapped.images, free.images)


# eot


def test_eot_asks_a_random_pipeline_more_often_and_a_fixed_one_no_more() -> None:
    model = convolutional()
    images, labels, ids = labelled(model, SHAPE, 3)
    threat = Threat("linf", 4 / 255)
    fixed = Eot(attack=Pgd(steps=4), samples=5)(View(model, ImageRng(0, ids), stop=False), images, labels, threat)
    assert (fixed.steps == 4).all()
    model.__class__ = Noisy
    random = Eot(attack=Pgd(steps=4), samples=5)(View(model, ImageRng(0, ids), stop=False), images, labels, threat)
    assert (random.steps == 20).all()
    more = View(model, ImageRng(0, ids), stop=False, samples=6)
    assert (Eot(attack=Pgd(steps=4), samples=5)(more, images, labels, threat).steps == 24).all()
    assert more.samples == 6


def test_eot_learns_from_as_many_draws_as_it_attacks_with() -> None:
    model = convolutional()
    images, labels, ids = labelled(model, SHAPE, 4)
    threat = Threat("linf", 8 / 255)
    inner = Universal(steps=2, images=4)
    eot = Eot(attack=inner, samples=5)
    assert eot.fit_budget(4) == inner.fit_budget(4, 5) == (40, 40)
    model.__class__ = Noisy
    view, plain = View(model, ImageRng(0, ids)), View(model, ImageRng(0, ids), samples=5)
    learned, expected = eot.fit(view, images, labels, threat).inner[0], inner.fit(plain, images, labels, threat)
    assert int(view.queries.backwards.sum()) == 40
    assert view.samples == 1
    assert isinstance(learned, Universal)
    assert isinstance(expected, Universal)
    assert torch.equal(learned._fitted(), expected._fitted())
