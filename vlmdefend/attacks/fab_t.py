"""Targeted FAB: the nearest adversarial image over the boundary with each likely wrong class in turn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from vlmdefend.attacks import ATTACKS
from vlmdefend.attacks._fab import Steps, approach
from vlmdefend.attacks._runs import Run, best_of, check_options, likely_wrong
from vlmdefend.attacks.base import Attack
from vlmdefend.attacks.view import View
from vlmdefend.rng import ImageRng
from vlmdefend.types import Threat


@ATTACKS.register
@dataclass(frozen=True, kw_only=True)
class FabT(Attack):
    """Fast adaptive boundary attack (Croce & Hein 2020b) on one boundary at a time (Croce & Hein 2020, section 5).

    min(targets, C - 1) classes, likeliest first; any wrong prediction on the way is a success if its norm is at most
    eps.

    Options:
        steps: projections per class and restart; each costs a gradient, and the backward step after an adversarial
            iterate another.
        restarts: the first from the clean image, others from random points of the ball.
        targets: the most wrong classes to try.
        alpha_max: the largest weight of the clean image's own projection.
        eta: overshoot of a projection.
        beta: how far towards an adversarial iterate the backward step stays.

    Raises:
        UserError: steps, restarts or targets below 1.
    """

    name: ClassVar[str] = "fab-t"
    summary: ClassVar[str] = "FAB towards the 9 likeliest wrong classes, 100 steps each"
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
        """At most two gradients per projection (every other iterate adversarial), and a forward per run and in all."""
        runs = self.targets * self.restarts
        return (runs * (2 * self.steps + 1) + 1) * samples, 2 * runs * self.steps * samples

    def perturb(self, view: View, images: Tensor, labels: Tensor, threat: Threat, rng: ImageRng) -> Tensor:
        """All classes, each with all restarts."""
        ranked = likely_wrong(view(images), labels, self.targets)
        steps = Steps(self.steps, self.alpha_max, self.eta, self.beta)

        def run(rank: int, restart: int, todo: Tensor) -> tuple[Tensor, Tensor]:
            draws = rng.child(f"class {rank} restart {restart}").select(todo) if restart else None
            target = ranked[todo, rank][:, None]
            return approach(view.select(todo), images[todo], labels[todo], threat.select(todo), target, steps, draws)

        def runs() -> Iterator[Run]:
            for rank in range(ranked.shape[1]):
                for restart in range(self.restarts):
                    yield partial(run, rank, restart)

        return best_of(runs(), view, images)
