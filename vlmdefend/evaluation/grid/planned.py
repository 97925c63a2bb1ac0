"""A planned cell and the plan of a grid: the cells to compute, before any weights are loaded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from vlmdefend.attacks.base import Attack
from vlmdefend.data.base import ImageSet
from vlmdefend.defenses.base import Defense
from vlmdefend.errors import UserError
from vlmdefend.evaluation.cell.attackers import variants
from vlmdefend.evaluation.grid.grid import Grid
from vlmdefend.evaluation.grid.protocol import Protocol
from vlmdefend.types import Attacker, Norm


@dataclass(frozen=True)
class PlannedCell:
    """One cell that will be computed, without the hashes that need weights."""

    model: str
    images: ImageSet
    defense: Defense
    attack: Attack
    attacker: Attacker
    norm: Norm
    eps: float
    seed: int

    def gradients(self) -> tuple[int, int]:
        """Returns upper bounds on the forwards and backwards of the pipeline, over all images of the cell.

        One forward is one call of the pipeline; a defense may run the model several times in it (views, draws, steps).
        """
        samples = self.defense.recipe.samples if self.attacker == "adaptive" else 1
        tries = len(variants(self.attacker, self.defense))
        forwards, backwards = (tries * spent for spent in self.attack.budget(samples))
        fit = self.attack.fit_budget(min(self.attack.learns_from, len(self.images)), samples)
        count = len(self.images)
        return (forwards + 2 + 2 * samples) * count + fit[0], backwards * count + fit[1]


@dataclass(frozen=True)
class Plan:
    """A grid, its protocol and its cells in the order in which they run: one model and one data set at a time."""

    grid: Grid
    protocol: Protocol
    cells: list[PlannedCell]


def check_templates(templates: Any) -> Any:
    """Returns the templates if each has the placeholder ``{c}`` and no other braces.

    Raises:
        UserError: a template without the placeholder, or with other braces.
    """
    for template in () if templates == "dataset" else templates:
        if "{c}" not in template:
            raise UserError(f"--template {template!r}: has no {{c}}; write it where the class name goes.")
        if re.search(r"[{}]", template.replace("{c}", "")):
            raise UserError(f"--template {template!r}: has other braces than {{c}}; write the words themselves.")
    return templates
