"""Runs an attack several times with different random numbers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from vlmdefend.attacks import ATTACKS
from vlmdefend.attacks.best_iterates import best_of, check_options
from vlmdefend.attacks.composite._wrapper import Wrapper
from vlmdefend.attacks.view import View
from vlmdefend.rng import ImageRng
from vlmdefend.types import Threat


@ATTACKS.register
@dataclass(frozen=True, kw_only=True)
class Repeated(Wrapper):
    """The attack ``n`` times from other streams, each on the images not yet fooled; the highest margin per image.

    Options as of :class:`~vlmdefend.attacks.composite._wrapper.Wrapper`, and:
        n: how often.

    Raises:
        UserError: as there, and n below 1.
    """

    name: ClassVar[str] = "repeated"
    summary: ClassVar[str] = "an attack n times with other random numbers, best per image"
    citation: ClassVar[str] = "–"
    quick: ClassVar[dict[str, Any]] = {"attack": "[pgd:steps=4]", "n": 2}
    n: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self.name, n=self.n)

    def budget(self, samples: int = 1) -> tuple[int, int]:
        """Returns n times the budget of the attack inside, and two forwards per repetition."""
        forwards, backwards = self.inner[0].budget(samples)
        return self.n * (forwards + 2 * samples), self.n * backwards

    def perturb(self, view: View, images: Tensor, labels: Tensor, threat: Threat, rng: ImageRng) -> Tensor:
        """Runs all repetitions, each on the images not fooled so far."""

        def run(number: int, todo: Tensor) -> tuple[Tensor, Tensor]:
            part = view.select(todo)
            part.rng = view.rng.child(f"repeat {number}").select(todo)
            found = self.inner[0](part, images[todo], labels[todo], threat.select(todo))
            return found.images, found.margin

        return best_of((partial(run, number) for number in range(self.n)), view, images)
