"""Chooses the planner of a grid: attacks to run, or saved adversarial sets to score."""

from __future__ import annotations

from vlmdefend.evaluation.adversarial_sets.scoring import plan_saved
from vlmdefend.evaluation.grid.grid import Grid
from vlmdefend.evaluation.grid.plan import plan_attacks
from vlmdefend.evaluation.grid.planned import Plan


def make_plan(grid: Grid) -> Plan:
    """Returns the cells of a grid, in the order in which they run.

    Raises:
        UserError: an unknown name, an eps out of range, a data set or saved set that is not there; nothing is computed.
    """
    return plan_saved(grid) if grid.adversarial else plan_attacks(grid)
