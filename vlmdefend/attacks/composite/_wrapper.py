"""The base of attacks that run one other attack with a change (repeated, targeted, averaged over draws)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

from torch import Tensor

from vlmdefend.attacks.base import Attack
from vlmdefend.attacks.nested import inherit_properties, nested_attack, text_of
from vlmdefend.attacks.view import View
from vlmdefend.types import Threat


@dataclass(frozen=True, kw_only=True)
class Wrapper(Attack):
    """An attack around another one, whose norms and other properties it inherits.

    Options of wrappers of one attack:
        attack: its text, in brackets if it has options: ``[pgd:steps=20]``; in Python also the attack itself.

    Raises:
        UserError: an unknown attack or option; more than one attack.
    """

    attack: str | Attack = "pgd"

    def __post_init__(self) -> None:
        inherit_properties(self, attack=nested_attack(self.name, self.attack))

    @property
    def inner(self) -> tuple[Attack, ...]:
        """The attack inside, as a tuple of one."""
        return (cast(Attack, self.attack),)

    @property
    def keeps_best(self) -> bool:
        """The property of the attack inside."""
        return self.inner[0].keeps_best

    @property
    def learns_from(self) -> int:
        """The property of the attack inside."""
        return self.inner[0].learns_from

    def fit(self, view: View, images: Tensor, labels: Tensor, threat: Threat) -> Attack:
        """Returns the wrapper around the fitted attack."""
        return replace(self, attack=self.inner[0].fit(view, images, labels, threat))

    def spec(self) -> dict[str, Any]:
        """Returns the options, with the attack inside as a text that holds all its own options."""
        return {**super().spec(), "attack": text_of(self.inner[0])}
