"""Gives an attack a target class."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from vlmdefend.attacks import ATTACKS
from vlmdefend.attacks.base import Attack
from vlmdefend.attacks.composite._wrapper import Wrapper
from vlmdefend.attacks.target_classes import Target
from vlmdefend.attacks.view import View
from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng
from vlmdefend.types import Threat


@ATTACKS.register
@dataclass(frozen=True, kw_only=True)
class Targeted(Wrapper):
    """The attack with a target class in its loss; the same as the attack's own option ``target``.

    The verdict counts every wrong prediction, whatever class the loss aims at.

    Options as of :class:`~vlmdefend.attacks.composite._wrapper.Wrapper`, and:
        target: ``random``, ``second`` (most likely wrong class), ``least`` (likely), or a class index.

    Raises:
        UserError: as there; an attack that knows no target, or has one already.
    """

    name: ClassVar[str] = "targeted"
    summary: ClassVar[str] = "an attack aimed at a random, the second, the least likely or a named class"
    citation: ClassVar[str] = "–"
    quick: ClassVar[dict[str, Any]] = {"attack": "[pgd:steps=6:restarts=2]"}
    target: Target = "second"

    def __post_init__(self) -> None:
        super().__post_init__()
        attack = self.inner[0]
        options = attack.spec()
        if "target" not in options:
            raise UserError(
                f"targeted: attack {attack.name} knows no target class; take one with the option target, such as pgd, "
                "mi or apgd-ce."
            )
        if options["target"] is not None:
            raise UserError(f"targeted: attack {attack.name} has target={options['target']} already; give it once.")
        assert self.aimed

    @property
    def aimed(self) -> Attack:
        """Returns the attack inside with its target set; raises what that attack raises for a bad target."""
        return replace(self.inner[0], target=self.target)  # type: ignore[type-var]

    def budget(self, samples: int = 1) -> tuple[int, int]:
        """Returns the budget of the attack inside, and two forwards."""
        forwards, backwards = self.aimed.budget(samples)
        return forwards + 2 * samples, backwards

    def perturb(self, view: View, images: Tensor, labels: Tensor, threat: Threat, rng: ImageRng) -> Tensor:
        """Runs the attack inside with its target."""
        return self.aimed(view, images, labels, threat).images
