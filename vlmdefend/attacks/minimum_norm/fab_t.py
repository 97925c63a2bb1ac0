"""Targeted FAB: the nearest adversarial image over the boundary with each likely wrong class in turn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from vlmdefend.attacks import ATTACKS
from vlmdefend.attacks.best_iterates import Run, best_of, likely_wrong
from vlmdefend.attacks.minimum_norm._fab import FabOptions, approach
from vlmdefend.attacks.minimum_norm.fab import Fab
from vlmdefend.attacks.view import View
from vlmdefend.rng import ImageRng
from vlmdefend.types import Threat


@ATTACKS.register
@dataclass(frozen=True, kw_only=True)
class FabT(Fab):
    """Fast adaptive boundary attack (Croce & Hein 2020b) on one boundary at a time (Croce & Hein 2020, section 5).

    min(targets, C - 1) classes, likeliest first; any wrong prediction on the way is a success if its norm is at most
    eps.

    Options as of :class:`~vlmdefend.attacks.minimum_norm.fab.Fab`; ``steps`` and ``restarts`` are per class here.

    Raises:
        UserError: steps, restarts or targets below 1.
    """

    name: ClassVar[str] = "fab-t"
    summary: ClassVar[str] = "FAB towards the 9 likeliest wrong classes, 100 steps each"

    def budget(self, samples: int = 1) -> tuple[int, int]:
        """Returns at most two gradients per projection, a forward per run, and one in all."""
        runs = self.targets * self.restarts
        return (runs * (2 * self.steps + 1) + 1) * samples, 2 * runs * self.steps * samples

    def perturb(self, view: View, images: Tensor, labels: Tensor, threat: Threat, rng: ImageRng) -> Tensor:
        """Runs all target classes, each with all restarts."""
        ranked = likely_wrong(view(images), labels, self.targets)
        steps = FabOptions(self.steps, self.alpha_max, self.eta, self.beta)

        def run(rank: int, restart: int, todo: Tensor) -> tuple[Tensor, Tensor]:
            draws = rng.child(f"class {rank} restart {restart}").select(todo) if restart else None
            target = ranked[todo, rank][:, None]
            return approach(view.select(todo), images[todo], labels[todo], threat.select(todo), target, steps, draws)

        def runs() -> Iterator[Run]:
            for rank in range(ranked.shape[1]):
                for restart in range(self.restarts):
                    yield partial(run, rank, restart)

        return best_of(runs(), view, images)
