"""An attack on the mean of several draws of a random pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlmdefend.attacks import ATTACKS
from vlmdefend.attacks.base import Attack
from vlmdefend.attacks.best_iterates import check_options
from vlmdefend.attacks.composite._wrapper import Wrapper
from vlmdefend.attacks.view import View
from vlmdefend.rng import ImageRng
from vlmdefend.types import Threat


@ATTACKS.register
@dataclass(frozen=True, kw_only=True)
class Eot(Wrapper):
    """Expectation over transformation (Athalye et al. 2018): logits and gradients are means of ``samples`` draws.

    Where the attacker draws more often already, that stays; where the pipeline is not random, one draw is all.

    Options as of :class:`~vlmdefend.attacks.composite._wrapper.Wrapper`, and:
        samples: draws per query.

    Raises:
        UserError: as there, and samples below 1.
    """

    name: ClassVar[str] = "eot"
    summary: ClassVar[str] = "an attack on the mean of several draws of a random pipeline"
    citation: ClassVar[str] = "Athalye et al. 2018"
    quick: ClassVar[dict[str, Any]] = {"attack": "[pgd:steps=4]"}
    samples: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self.name, samples=self.samples)

    def budget(self, samples: int = 1) -> tuple[int, int]:
        """Returns the budget of the attack inside at the larger number of draws, and two forwards."""
        draws = max(samples, self.samples)
        forwards, backwards = self.inner[0].budget(draws)
        return forwards + 2 * draws, backwards

    def fit_budget(self, count: int, samples: int = 1) -> tuple[int, int]:
        """Returns the fit budget of the attack inside at the larger number of draws."""
        return self.inner[0].fit_budget(count, max(samples, self.samples))

    def fit(self, view: View, images: Tensor, labels: Tensor, threat: Threat) -> Attack:
        """Fits the attack inside on a view that averages more draws."""
        return super().fit(self._drawn(view), images, labels, threat)

    def perturb(self, view: View, images: Tensor, labels: Tensor, threat: Threat, rng: ImageRng) -> Tensor:
        """Runs the attack inside on a view that averages more draws."""
        return self.inner[0](self._drawn(view), images, labels, threat).images

    def _drawn(self, view: View) -> View:
        part = view.select(torch.arange(len(view)))
        if view.stochastic:
            part.samples = max(view.samples, self.samples)
        return part
