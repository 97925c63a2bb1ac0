"""C&W: the nearest adversarial image in L2, by Adam in tanh space and a search for the weight of the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from vlmdefend.attacks import ATTACKS
from vlmdefend.attacks.base import Attack
from vlmdefend.attacks.best_iterates import check_options
from vlmdefend.attacks.criterion import Criterion
from vlmdefend.attacks.minimum_norm._cw import descend
from vlmdefend.attacks.target_classes import Target, choose_targets
from vlmdefend.attacks.view import View
from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng
from vlmdefend.types import Norm, Threat


@ATTACKS.register
@dataclass(frozen=True, kw_only=True)
class Cw(Attack):
    """Carlini & Wagner 2017, section VI-A: ``min ||x' - x||^2 + c max(z_y - max_{i != y} z_i, -kappa)``.

    It looks for the nearest adversarial image; success is a norm of at most eps, and where the view allows it the
    search stops at the first adversarial image inside the ball. Where none is inside, the nearest one is projected.

    Options:
        steps: Adam steps per value of c; the authors' code has 10,000 and stops where the objective rests.
        searches: values of c; times 10 until one succeeds, then halving between success and failure.
        c: the first.
        lr: Adam's.
        kappa: the margin that counts as success in the search.
        target: a class to reach: ``random``, ``second`` (most likely wrong class), ``least``, or a class index. Another
            wrong prediction counts too.

    Raises:
        UserError: steps or searches below 1, c or lr not positive, a negative kappa.
    """

    name: ClassVar[str] = "cw"
    summary: ClassVar[str] = "minimal-norm attack by Adam in tanh space, 9 x 1,000 steps"
    citation: ClassVar[str] = "Carlini & Wagner 2017"
    norms: ClassVar[tuple[Norm, ...]] = ("l2",)
    quick: ClassVar[dict[str, Any]] = {"steps": 30, "searches": 3, "c": 0.1}
    steps: int = 1000
    searches: int = 9
    c: float = 1e-3
    lr: float = 0.01
    kappa: float = 0.0
    target: Target | None = None

    def __post_init__(self) -> None:
        check_options(self.name, steps=self.steps, searches=self.searches)
        if self.c <= 0 or self.lr <= 0 or self.kappa < 0:
            raise UserError(f"cw: c={self.c} and lr={self.lr} must be positive, kappa={self.kappa} zero or more.")

    def budget(self, samples: int = 1) -> tuple[int, int]:
        """Returns ``steps`` gradients per search, a forward for the result, and one to choose a target."""
        gradients = self.steps * self.searches
        return (gradients + 1 + (self.target is not None)) * samples, gradients * samples

    def perturb(self, view: View, images: Tensor, labels: Tensor, threat: Threat, rng: ImageRng) -> Tensor:
        """Runs all searches."""
        targets = None if self.target is None else choose_targets(self.target, view, images, labels, rng)
        return descend(
            view,
            images,
            Criterion(labels, targets),
            threat,
            steps=self.steps,
            searches=self.searches,
            c=self.c,
            lr=self.lr,
            kappa=self.kappa,
        )
