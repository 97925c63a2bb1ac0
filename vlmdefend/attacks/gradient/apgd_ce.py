"""Auto-PGD on the cross-entropy."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from vlmdefend.attacks import ATTACKS
from vlmdefend.attacks.base import Attack
from vlmdefend.attacks.best_iterates import best_of, check_options
from vlmdefend.attacks.gradient._apgd import climb
from vlmdefend.attacks.losses import LOSSES
from vlmdefend.attacks.target_classes import Target, choose_targets
from vlmdefend.attacks.view import View
from vlmdefend.rng import ImageRng
from vlmdefend.types import Threat


@ATTACKS.register
@dataclass(frozen=True, kw_only=True)
class ApgdCe(Attack):
    """Auto-PGD (Croce & Hein 2020, section 3) raising the cross-entropy of the label; no step size to choose.

    Options:
        steps: gradient steps per restart.
        restarts: independent starts on the ball's surface, each on the images that the earlier ones did not fool.
        rho: the share of steps that must raise the loss, or the step size is halved.
        target: a class that the loss aims at: ``random``, ``second`` (most likely wrong class), ``least``, or a class
            index. Another wrong prediction counts too.

    Raises:
        UserError: steps or restarts below 1, rho outside [0, 1].
    """

    name: ClassVar[str] = "apgd-ce"
    summary: ClassVar[str] = "Auto-PGD on the cross-entropy, 100 steps"
    citation: ClassVar[str] = "Croce & Hein 2020"
    quick: ClassVar[dict[str, Any]] = {"steps": 20}
    loss: ClassVar[str] = "ce"
    steps: int = 100
    restarts: int = 1
    rho: float = 0.75
    target: Target | None = None

    def __post_init__(self) -> None:
        check_options(self.name, steps=self.steps, restarts=self.restarts, rho=self.rho)

    def budget(self, samples: int = 1) -> tuple[int, int]:
        """Returns ``steps`` gradients per restart, a forward for the last iterate, and one to choose a target."""
        forwards = self.restarts * (self.steps + 1) + (self.target is not None)
        return forwards * samples, self.restarts * self.steps * samples

    def perturb(self, view: View, images: Tensor, labels: Tensor, threat: Threat, rng: ImageRng) -> Tensor:
        """Runs all restarts."""
        targets = None if self.target is None else choose_targets(self.target, view, images, labels, rng)

        def run(restart: int, todo: Tensor) -> tuple[Tensor, Tensor]:
            return climb(
                view.select(todo),
                images[todo],
                labels[todo],
                threat.select(todo),
                rng.child(f"restart {restart}").select(todo),
                loss=LOSSES[self.loss],
                steps=self.steps,
                rho=self.rho,
                targets=None if targets is None else targets[todo],
            )

        return best_of((partial(run, restart) for restart in range(self.restarts)), view, images)
