"""The base of attacks whose loss compares with the clean outputs and uses no label."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmdefend.attacks.base import Attack
from vlmdefend.attacks.best_iterates import check_options
from vlmdefend.attacks.criterion import Criterion
from vlmdefend.attacks.gradient.pgd import step_size
from vlmdefend.attacks.losses import LOSSES
from vlmdefend.attacks.view import View, chunks
from vlmdefend.kernels.l2 import l2_step_
from vlmdefend.kernels.linf import linf_step_
from vlmdefend.rng import ImageRng
from vlmdefend.types import Threat, per_image


@dataclass(frozen=True, kw_only=True)
class LabelFree(Attack):
    """PGD steps from a random start (at the clean image the loss has no gradient); keeps the iterate of highest loss.

    The label chooses nothing: no image leaves early, the best iterate and restart are those of highest loss (of a
    random pipeline the last ones), and the result is scored even where the clean image was worse for the model.

    Options of label-free attacks:
        steps: gradient steps per restart.
        alpha: step size: ``eps/4`` (default), ``2.5eps/steps``, or a number as ``1/255``.
        restarts: independent random starts.

    Raises:
        UserError: steps or restarts below 1, an alpha of another form; a pipeline without features, where the loss
            needs them, when it attacks.
    """

    steps: int = 10
    alpha: str = "eps/4"
    restarts: int = 1

    def __post_init__(self) -> None:
        check_options(self.name, steps=self.steps, restarts=self.restarts)
        step_size(self.alpha, 1.0, self.steps)

    @property
    def keeps_best(self) -> bool:
        """False: which iterate is better is decided by the loss, not by labels."""
        return False

    @property
    @abstractmethod
    def loss_name(self) -> str:
        """The loss, by its name in attacks/losses.py."""

    def budget(self, samples: int = 1) -> tuple[int, int]:
        """Returns ``steps`` gradients and a forward per restart, and a forward for the clean outputs."""
        return (self.restarts * (self.steps + 1) + 1) * samples, self.restarts * self.steps * samples

    def perturb(self, view: View, images: Tensor, labels: Tensor, threat: Threat, rng: ImageRng) -> Tensor:
        """Runs all restarts on all images."""
        result = images.clone()
        for chunk in chunks(len(images), view.width):
            part = view.select(chunk)
            clean = images[chunk]
            criterion = Criterion(labels[chunk], reference=part.outputs(clean))
            highest = torch.full((len(chunk),), -torch.inf, device=images.device)
            for restart in range(self.restarts):
                streams = rng.child(f"restart {restart}").select(chunk)
                found, value = self._climb(part, clean, criterion, threat.select(chunk), streams)
                better = value > highest if restart else torch.ones_like(value, dtype=torch.bool)
                highest = torch.where(better, value, highest)
                result[chunk] = torch.where(per_image(better, found), found, result[chunk])
        return result

    def _climb(
        self, view: View, clean: Tensor, criterion: Criterion, threat: Threat, rng: ImageRng
    ) -> tuple[Tensor, Tensor]:
        """Returns the (B, ...) iterates of highest loss and (B,) these losses."""
        loss, step_ = LOSSES[self.loss_name], linf_step_ if threat.norm == "linf" else l2_step_
        alpha = step_size(self.alpha, threat.eps, self.steps)
        x = threat.random_start(clean, rng)
        best, highest = x.clone(), torch.full((len(x),), -torch.inf, device=x.device)
        for _ in range(self.steps):
            query = view.gradient(x, criterion, loss)
            better = query.loss > highest
            highest = torch.where(better, query.loss, highest)
            torch.where(per_image(better, x), x, best, out=best)
            step_(x, query.pixels, clean, alpha, threat.eps)
        value = loss(view.outputs(x), criterion)
        better = value > highest if not view.stochastic else torch.ones_like(value, dtype=torch.bool)
        return torch.where(per_image(better, x), x, best), torch.where(better, value, highest)
