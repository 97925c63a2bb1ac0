"""FGSM: one step of the full radius from the clean image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from vlmdefend.attacks import ATTACKS
from vlmdefend.attacks.base import Attack
from vlmdefend.attacks.criterion import Criterion
from vlmdefend.attacks.losses import LOSSES
from vlmdefend.attacks.target_classes import Target, choose_targets
from vlmdefend.attacks.view import View, chunks
from vlmdefend.kernels.l2 import l2_step_
from vlmdefend.kernels.linf import linf_step_
from vlmdefend.rng import ImageRng
from vlmdefend.types import Threat


@ATTACKS.register
@dataclass(frozen=True, kw_only=True)
class Fgsm(Attack):
    """Fast gradient sign method, x' = clamp01(x + eps sign(grad)) (Goodfellow et al. 2015, section 4).

    Under L2 the step is eps along the normalised gradient.

    Options:
        loss: what is raised; see attacks/losses.py.
        target: a class that the loss aims at: ``random``, ``second`` (most likely wrong class), ``least``, or a class
            index.
    """

    name: ClassVar[str] = "fgsm"
    summary: ClassVar[str] = "one sign step of size eps"
    citation: ClassVar[str] = "Goodfellow et al. 2015"
    loss: Literal["ce", "cw", "cw50", "dlr"] = "ce"
    target: Target | None = None

    def budget(self, samples: int = 1) -> tuple[int, int]:
        """Returns one gradient, and a forward to choose a target."""
        return (1 + (self.target is not None)) * samples, samples

    def perturb(self, view: View, images: Tensor, labels: Tensor, threat: Threat, rng: ImageRng) -> Tensor:
        """Takes one step per image."""
        step_ = linf_step_ if threat.norm == "linf" else l2_step_
        result, criterion = images.clone(), Criterion(labels)
        if self.target is not None:
            criterion = Criterion(labels, choose_targets(self.target, view, images, labels, rng))
        for chunk in chunks(len(images), view.width):
            eps = threat.select(chunk).eps
            pixels = view.select(chunk).gradient(images[chunk], criterion.select(chunk), LOSSES[self.loss]).pixels
            result[chunk] = step_(result[chunk], pixels, images[chunk], eps, eps)
        return result
