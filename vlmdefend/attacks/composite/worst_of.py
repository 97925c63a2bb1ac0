"""Several attacks in sequence, the best result per image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, cast

from torch import Tensor

from vlmdefend.attacks import ATTACKS
from vlmdefend.attacks.base import Attack
from vlmdefend.attacks.best_iterates import best_of
from vlmdefend.attacks.nested import inherit_properties, nested_attacks, text_of
from vlmdefend.attacks.view import View
from vlmdefend.rng import ImageRng
from vlmdefend.types import Threat


@ATTACKS.register
@dataclass(frozen=True, kw_only=True)
class WorstOf(Attack):
    """Every attack on the images that the earlier ones did not fool; per image the result of highest margin.

    Each member gets the streams that it would get alone, so a member's result is that of the member by itself.

    Options:
        attacks: texts with + between them, those with options in brackets: ``[pgd:steps=20]+square``; in Python also
            a sequence of attacks.

    Raises:
        UserError: an unknown attack or option, or attacks that have no norm in common.
    """

    name: ClassVar[str] = "worst-of"
    summary: ClassVar[str] = "several attacks, each on what is still robust"
    citation: ClassVar[str] = "–"
    quick: ClassVar[dict[str, Any]] = {"attacks": "[pgd:steps=4]+[apgd-ce:steps=6]"}
    attacks: str | Sequence[str | Attack] = "pgd+apgd-ce"

    def __post_init__(self) -> None:
        object.__setattr__(self, "attacks", nested_attacks(self.attacks))
        inherit_properties(self)

    @property
    def inner(self) -> tuple[Attack, ...]:
        """The member attacks."""
        return cast(tuple[Attack, ...], self.attacks)

    @property
    def keeps_best(self) -> bool:
        """True if any member keeps the best."""
        return any(attack.keeps_best for attack in self.inner)

    @property
    def learns_from(self) -> int:
        """The largest number of images that a member is fitted to."""
        return max(attack.learns_from for attack in self.inner)

    def fit(self, view: View, images: Tensor, labels: Tensor, threat: Threat) -> Attack:
        """Returns the sequence with every member fitted to the same images."""
        return replace(self, attacks=tuple(attack.fit(view, images, labels, threat) for attack in self.inner))

    def spec(self) -> dict[str, Any]:
        """Returns the members with all their options, as text."""
        return {"attacks": "+".join(text_of(attack) for attack in self.inner)}

    def budget(self, samples: int = 1) -> tuple[int, int]:
        """Returns the sum over the members, and two forwards for each."""
        spent = [attack.budget(samples) for attack in self.inner]
        return sum(forwards + 2 * samples for forwards, _ in spent), sum(backwards for _, backwards in spent)

    def perturb(self, view: View, images: Tensor, labels: Tensor, threat: Threat, rng: ImageRng) -> Tensor:
        """Runs the members in order, each on the images not fooled so far."""

        def run(attack: Attack, todo: Tensor) -> tuple[Tensor, Tensor]:
            found = attack(view.select(todo), images[todo], labels[todo], threat.select(todo))
            return found.images, found.margin

        return best_of((partial(run, attack) for attack in self.inner), view, images)
