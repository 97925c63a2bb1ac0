"""The learning rate of every step: linear warm-up, then half a cosine to zero; or a slow power of the step."""

from __future__ import annotations

import math
from typing import NamedTuple

LONGEST_WARM_UP = 1000  # steps: what the authors' code uses, whatever the length of the run
WARM_UP_SHARE = 0.1


class Decay(NamedTuple):
    """rate x (1 + gamma k)^-power at step k, as tllib and DART; does not depend on the length of the run."""

    gamma: float = 0.001
    power: float = 0.75

    def factor(self, step: int) -> float:
        """Returns the factor of the base rate at a step."""
        return float((1.0 + self.gamma * step) ** -self.power)


def learning_rate(step: int, steps: int, base: float, warm_up: int) -> float:
    """Returns the rate of ``step`` (0, 1, ... ``steps`` - 1) under CLIP's schedule, as the HPT-GPD code uses it.

    A run no longer than its warm-up never reaches ``base``; :func:`warm_up_steps` keeps that from happening unasked.
    """
    if step < warm_up:
        return base * (step + 1) / warm_up
    return 0.5 * (1.0 + math.cos(math.pi * (step - warm_up) / (steps - warm_up))) * base


def warm_up_steps(steps: int) -> int:
    """Returns 1,000 steps as published, but at most a tenth of the run."""
    return min(LONGEST_WARM_UP, int(WARM_UP_SHARE * steps))
