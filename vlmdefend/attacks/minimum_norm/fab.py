"""FAB: the nearest adversarial image, by projections onto linearised decision boundaries."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from vlmdefend.attacks import ATTACKS
from vlmdefend.attacks.base import Attack
from vlmdefend.attacks.best_iterates import best_of, check_options, likely_wrong
from vlmdefend.attacks.minimum_norm._fab import FabOptions, approach
from vlmdefend.attacks.view import View
from vlmdefend.rng import ImageRng
from vlmdefend.types import Threat


@ATTACKS.register
@dataclass(frozen=True, kw_only=True)
class Fab(Attack):
    """Fast adaptive boundary attack (Croce & Hein 2020b, algorithm 1), towards the nearest of several boundaries.

    The paper linearises the boundary with every wrong class; here with the ``targets`` likeliest ones, which is all
    of them up to 10 classes. Success is a norm of at most eps.

    Options:
        steps: projections per restart; each costs a gradient per class, and a backward step after an adversarial
            iterate as many again.
        restarts: the first from the clean image, others from random points of the ball.
        targets: the most wrong classes to linearise.
        alpha_max: the largest weight of the clean image's own projection.
        eta: overshoot of a projection.
        beta: how far towards an adversarial iterate the backward step stays.

    Raises:
        UserError: steps, restarts or targets below 1.
    """

    name: ClassVar[str] = "fab"
    summary: ClassVar[str] = "minimal-norm attack by projection onto linearised boundaries, 100 steps"
    citation: ClassVar[str] = "Croce & Hein 2020b"
    quick: ClassVar[dict[str, Any]] = {"steps": 6, "targets": 3}
    steps: int = 100
    restarts: int = 1
    targets: int = 9
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9

    def __post_init__(self) -> None:
        check_options(self.name, steps=self.steps, restarts=self.restarts, targets=self.targets)

    def budget(self, samples: int = 1) -> tuple[int, int]:
        """Returns at most two gradients per projection and class, and two forwards."""
        gradients = 2 * self.steps * self.targets * self.restarts
        return (gradients + self.restarts + 1) * samples, gradients * samples

    def perturb(self, view: View, images: Tensor, labels: Tensor, threat: Threat, rng: ImageRng) -> Tensor:
        """Runs all restarts."""
        classes = likely_wrong(view(images), labels, self.targets)
        steps = FabOptions(self.steps, self.alpha_max, self.eta, self.beta)

        def run(restart: int, todo: Tensor) -> tuple[Tensor, Tensor]:
            draws = rng.child(f"restart {restart}").select(todo) if restart else None
            return approach(
                view.select(todo), images[todo], labels[todo], threat.select(todo), classes[todo], steps, draws
            )

        return best_of((partial(run, restart) for restart in range(self.restarts)), view, images)
