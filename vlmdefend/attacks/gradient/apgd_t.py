"""Auto-PGD on the targeted difference of logits ratio, towards each of the most likely wrong classes in turn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from vlmdefend.attacks import ATTACKS
from vlmdefend.attacks.base import Attack
from vlmdefend.attacks.best_iterates import Run, best_of, check_options, likely_wrong
from vlmdefend.attacks.gradient._apgd import climb
from vlmdefend.attacks.losses import LOSSES
from vlmdefend.attacks.view import View
from vlmdefend.rng import ImageRng
from vlmdefend.types import Threat


@ATTACKS.register
@dataclass(frozen=True, kw_only=True)
class ApgdT(Attack):
    """Targeted Auto-PGD (Croce & Hein 2020, sections 3 and 4): min(targets, C - 1) classes, likeliest first.

    Any wrong prediction on the way is a success; each class is tried on the images that are still right.

    Options:
        steps: gradient steps per restart and class.
        restarts: independent starts on the ball's surface per class.
        rho: the share of steps that must raise the loss, or the step size is halved.
        targets: the most wrong classes to try.

    Raises:
        UserError: an option below 1, rho outside [0, 1]; a model of fewer than 4 classes, when it attacks.
    """

    name: ClassVar[str] = "apgd-t"
    summary: ClassVar[str] = "Auto-PGD towards the 9 likeliest wrong classes, 100 steps each"
    citation: ClassVar[str] = "Croce & Hein 2020"
    quick: ClassVar[dict[str, Any]] = {"steps": 8, "targets": 3}
    steps: int = 100
    restarts: int = 1
    rho: float = 0.75
    targets: int = 9

    def __post_init__(self) -> None:
        check_options(self.name, steps=self.steps, restarts=self.restarts, rho=self.rho, targets=self.targets)

    def budget(self, samples: int = 1) -> tuple[int, int]:
        """Returns ``steps`` gradients and a forward per class and restart, and a forward to rank the classes."""
        runs = self.restarts * self.targets
        return (runs * (self.steps + 1) + 1) * samples, runs * self.steps * samples

    def perturb(self, view: View, images: Tensor, labels: Tensor, threat: Threat, rng: ImageRng) -> Tensor:
        """Runs all target classes, each with all restarts."""
        ranked = likely_wrong(view(images), labels, self.targets)

        def run(rank: int, restart: int, todo: Tensor) -> tuple[Tensor, Tensor]:
            return climb(
                view.select(todo),
                images[todo],
                labels[todo],
                threat.select(todo),
                rng.child(f"class {rank} restart {restart}").select(todo),
                loss=LOSSES["dlr"],
                steps=self.steps,
                rho=self.rho,
                targets=ranked[todo, rank],
            )

        def runs() -> Iterator[Run]:
            for rank in range(ranked.shape[1]):
                for restart in range(self.restarts):
                    yield partial(run, rank, restart)

        return best_of(runs(), view, images)
