"""What an attack inside of another spends, and puts outside the budget, counts for the outer one."""

from __future__ import annotations

import pytest
from torch import Tensor

from tests.attacks.conftest import Noisy, convolutional, labelled
from vlmdefend.attacks import ATTACKS
from vlmdefend.attacks.base import Attack
from vlmdefend.attacks.composite.eot import Eot
from vlmdefend.attacks.composite.repeated import Repeated
from vlmdefend.attacks.composite.targeted import Targeted
from vlmdefend.attacks.composite.worst_of import WorstOf
from vlmdefend.attacks.gradient.mi import Mi
from vlmdefend.attacks.gradient.pgd import Pgd
from vlmdefend.attacks.view import View
from vlmdefend.rng import ImageRng
from vlmdefend.types import Threat

SHAPE = (3, 8, 8)


class Careless(Pgd):
    """Leaves the ball on every image."""

    def perturb(self, view: View, images: Tensor, labels: Tensor, threat: Threat, rng: ImageRng) -> Tensor:
        return images + 0.1


@pytest.mark.parametrize(
    ("attack", "expected"),
    [
        (WorstOf(attacks=[Pgd(steps=2), Careless()]), 3),
        (Repeated(attack=Careless(), n=2), 6),
        (Eot(attack=Repeated(attack=Careless(), n=2)), 6),
        (Careless(), 3),
    ],
    ids=["worst-of", "repeated", "nested", "alone"],
)
def test_images_that_an_attack_inside_of_another_puts_outside_the_budget_are_counted(
    attack: Attack, expected: int
) -> None:
    model = convolutional()
    images, labels, ids = labelled(model, SHAPE, 3)
    view = View(model, ImageRng(0, ids), stop=False)
    assert attack(view, images, labels, Threat("linf", 0.01)).outside == expected
    assert attack(view, images, labels, Threat("linf", 0.01)).outside == expected  # of this call, not of both


@pytest.mark.parametrize(
    "attack",
    [
        WorstOf(attacks="[pgd:steps=3]+[mi:steps=4]"),
        Repeated(attack=Pgd(steps=3), n=3),
        Targeted(attack=Pgd(steps=3), target="least"),
        Targeted(attack=Mi(steps=3), target="random"),
        Eot(attack=Pgd(steps=3), samples=4),
        ATTACKS.create("si:steps=3:copies=2:plus=di"),
        ATTACKS.create("feature:steps=3:restarts=2"),
        ATTACKS.create("cw:steps=5:searches=3", c=0.1),
        ATTACKS.create("fgsm:target=second"),
    ],
    ids=lambda a: a.name,
)
@pytest.mark.parametrize("samples", [1, 2])
def test_no_more_is_spent_than_the_budget_says(attack: Attack, samples: int) -> None:
    model = convolutional()
    images, labels, ids = labelled(model, SHAPE, 3)
    model.__class__ = Noisy
    view = View(model, ImageRng(0, ids), samples=samples, stop=False)
    norm = "linf" if "linf" in attack.norms else "l2"
    attack(view, images, labels, Threat(norm, 0.01))
    forwards, backwards = attack.budget(samples)
    backwards_spent = int(view.queries.backwards.max())
    # the queries counts the forwards of gradients too, and the contract's own two
    assert backwards_spent <= backwards
    assert int(view.queries.forwards.max()) <= forwards + 2 * samples
