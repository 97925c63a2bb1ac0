"""What the wrappers of one attack share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

from torch import Tensor

from vlmdefend.attacks.base import Attack
from vlmdefend.attacks.nested import nested_attack, take_over, text_of
from vlmdefend.attacks.view import View
from vlmdefend.types import Threat


@dataclass(frozen=True, kw_only=True)
class Wrapper(Attack):
    """An attack around another, whose norms and way of scoring it takes over.

    Options of wrappers of one attack:
        attack: its text, in brackets if it has options: ``[pgd:steps=20]``; in Python also the attack itself.

    Raises:
        UserError: an unknown attack or option; more than one attack.
    """

    attack: str | Attack = "pgd"

    def __post_init__(self) -> None:
        take_over(self, attack=nested_attack(self.name, self.attack))

    @property
    def inner(self) -> tuple[Attack, ...]:
        """The one attack."""
        return (cast(Attack, self.attack),)

    @property
    def keeps_best(self) -> bool:
        """As the attack."""
        return self.inner[0].keeps_best

    @property
    def learns_from(self) -> int:
        """As the attack."""
        return self.inner[0].learns_from

    def fit(self, view: View, images: Tensor, labels: Tensor, threat: Threat) -> Attack:
        """The attack learns."""
        return replace(self, attack=self.inner[0].fit(view, images, labels, threat))

    def spec(self) -> dict[str, Any]:
        """The options, the attack as a text with all its own."""
        return {**super().spec(), "attack": text_of(self.inner[0])}
