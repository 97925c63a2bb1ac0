"""AutoAttack: a fixed sequence of attacks without anything to tune, each on the images that are still right."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vlmdefend.attacks import ATTACKS
from vlmdefend.attacks.base import Attack
from vlmdefend.attacks.best_iterates import best_of, check_options
from vlmdefend.attacks.gradient.apgd_ce import ApgdCe
from vlmdefend.attacks.gradient.apgd_dlr import ApgdDlr
from vlmdefend.attacks.gradient.apgd_t import ApgdT
from vlmdefend.attacks.minimum_norm.fab_t import FabT
from vlmdefend.attacks.query.square import Square
from vlmdefend.attacks.view import View
from vlmdefend.rng import ImageRng
from vlmdefend.types import Threat

VERSIONS: dict[str, tuple[str, ...]] = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "rand": ("apgd-ce", "apgd-dlr"),
    "fare": ("apgd-ce", "apgd-t"),
    "tecoa": ("apgd-ce", "apgd-dlr"),
}
CLASSES_NEEDED = {"apgd-dlr": 3, "apgd-t": 4}  # by the denominator of the difference of logits ratio
EOT_SAMPLES = 20


@ATTACKS.register
@dataclass(frozen=True, kw_only=True)
class AutoAttack(Attack):
    """AutoAttack (Croce & Hein 2020, section 5), and the two shorter sequences that papers on CLIP call by its name.

    A member that needs more classes than the model has is left out, with a warning.

    Options:
        version: ``standard``: apgd-ce, apgd-t, fab-t, square; ``rand``, for random pipelines: apgd-ce, apgd-dlr, with
            the mean of 20 draws per query; ``fare`` (FARE, CLIPure): apgd-ce, apgd-t; ``tecoa`` (the TeCoA line):
            apgd-ce, apgd-dlr.
        steps: of each member that has steps.
        queries: of square, with its schedule unscaled as in the authors' code.

    Raises:
        UserError: steps or queries below 1.
    """

    name: ClassVar[str] = "autoattack"
    summary: ClassVar[str] = "apgd-ce, apgd-t, fab-t and square, each on what is still robust"
    citation: ClassVar[str] = "Croce & Hein 2020"
    quick: ClassVar[dict[str, Any]] = {"steps": 4, "queries": 20}
    version: Literal["standard", "rand", "fare", "tecoa"] = "standard"
    steps: int = 100
    queries: int = 5000

    def __post_init__(self) -> None:
        check_options(self.name, steps=self.steps, queries=self.queries)

    def members(self, num_classes: int | None = None) -> list[Attack]:
        """Returns the attacks of this version, in order, that are defined for ``num_classes`` classes (None: all)."""
        build: dict[str, Callable[[], Attack]] = {
            "apgd-ce": lambda: ApgdCe(steps=self.steps),
            "apgd-dlr": lambda: ApgdDlr(steps=self.steps),
            "apgd-t": lambda: ApgdT(steps=self.steps),
            "fab-t": lambda: FabT(steps=self.steps),
            "square": lambda: Square(queries=self.queries, rescale=False),
        }
        names = VERSIONS[self.version]
        return [build[n]() for n in names if num_classes is None or num_classes >= CLASSES_NEEDED.get(n, 2)]

    def budget(self, samples: int = 1) -> tuple[int, int]:
        """Returns the sum over the members, and two forwards for each: to find the images still right, and to check its
        result.
        """
        draws = max(samples, EOT_SAMPLES) if self.version == "rand" else samples
        spent = [member.budget(draws) for member in self.members()]
        return sum(forwards + 2 * draws for forwards, _ in spent), sum(backwards for _, backwards in spent)

    def perturb(self, view: View, images: Tensor, labels: Tensor, threat: Threat, rng: ImageRng) -> Tensor:
        """Runs the members in order; an image that one has fooled goes to the next only where the view may differ from
        the deployed pipeline.
        """
        members = self.members(view.num_classes)
        for name in set(VERSIONS[self.version]) - {member.name for member in members}:
            warnings.warn(
                f"autoattack:version={self.version} leaves out {name}: it needs {CLASSES_NEEDED[name]} classes, the "
                f"model has {view.num_classes}.",
                stacklevel=2,
            )
        part = view.select(torch.arange(len(view)))
        if self.version == "rand" and view.stochastic:
            part.samples = max(view.samples, EOT_SAMPLES)

        def run(member: Attack, todo: Tensor) -> tuple[Tensor, Tensor]:
            found = member(part.select(todo), images[todo], labels[todo], threat.select(todo))
            return found.images, found.margin

        return best_of((partial(run, member) for member in members), view, images)
