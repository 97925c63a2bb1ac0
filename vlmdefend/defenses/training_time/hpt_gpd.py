"""HPT-GPD: transfers robustness from a vanilla proxy CLIP of another architecture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmdefend.defenses.training_time import OBJECTIVES
from vlmdefend.defenses.training_time._attack import train_pgd
from vlmdefend.defenses.training_time.base import (
    Objective,
    Reduction,
    StepCost,
    Student,
    Teacher,
    TeacherKind,
    Terms,
)
from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng
from vlmdefend.types import Batch

Direction = Literal["proxy-first", "target-first"]


@OBJECTIVES.register
@dataclass(frozen=True, kw_only=True)
class HptGpd(Objective):
    """Heterogeneous proxy transfer and its generalisation anchor (Fu et al. 2026, eqs. 5 and 8).

    The images x_a are PGD's against the target alone. Its class probabilities there are drawn to the proxy's: at the
    same x_a (HPT, eq. 5: robustness comes over), or at the clean image (GA, ``anchored``, eq. 8: generalisation stays).
    The two stages and the pull towards the pivot belong to the loop (``vlmdefend.training``).

    Options:
        anchored: False: HPT, the proxy sees x_a; True: GA, it sees the clean image.
        direction: ``proxy-first``, KL(p_P || p_T), is ordinary distillation and what the authors' code computes;
            ``target-first``, KL(p_T || p_P), is what their equations 5, 6 and 8 print. Near equality, and at logit
            scale 1, the two agree to second order.
        batch_reduction: ``mean`` over the batch as printed, so that the learning rate does not depend on its size; or
            ``sum``, as the code does. Under SGD a sum with rate r is a mean with rate r times the batch.
        eps: radius of the training attack, in pixels of [0, 1].
        steps: of the training attack.
        alpha: its step size. The paper gives none; its ancestor's command has alpha = eps = 1/255.
    """

    name: ClassVar[str] = "hpt-gpd"
    summary: ClassVar[str] = "adversarial robustness distilled from a vanilla proxy of another architecture"
    citation: ClassVar[str] = "Fu et al. 2026"
    teacher: ClassVar[TeacherKind] = "proxy"
    anchored: bool = False
    direction: Direction = "proxy-first"
    batch_reduction: Reduction = "mean"
    eps: float = 1 / 255
    steps: int = 2
    alpha: float = 1 / 255

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise UserError(f"hpt-gpd: steps={self.steps} must be zero or more.")

    @property
    def reduction(self) -> Reduction:
        """The option ``batch_reduction``."""
        return self.batch_reduction

    @property
    def cost(self) -> StepCost:
        """Returns the passes: forward and backward per attack step and for the update, and a forward of the proxy."""
        return StepCost(forward_backwards=self.steps + 1, teacher_forwards=1)

    def losses(self, student: Student, teacher: Teacher | None, batch: Batch, rng: ImageRng) -> Terms:
        """Returns the divergence per image; metrics: accuracies of target and proxy."""
        assert teacher is not None
        images, labels = batch.images, batch.labels
        adversarial = train_pgd(student.attacked, images, labels, rng, eps=self.eps, steps=self.steps, alpha=self.alpha)
        with torch.no_grad():
            proxy = teacher(images if self.anchored else adversarial).logits
        target = student(adversarial).logits
        divergence = divergence_of(target, proxy, self.direction)
        seen = "clean" if self.anchored else "adversarial"
        metrics = {
            "target_accuracy_adversarial": (target.detach().argmax(dim=1) == labels).float(),
            f"proxy_accuracy_{seen}": (proxy.argmax(dim=1) == labels).float(),
        }
        return Terms({"ga" if self.anchored else "hpt": divergence}, metrics)


def divergence_of(target: Tensor, proxy: Tensor, direction: Direction) -> Tensor:
    """Returns (B,) KL divergence of the softmax of (B, C) logits of target and proxy, at temperature 1."""
    log_target, log_proxy = target.log_softmax(dim=1), proxy.log_softmax(dim=1)
    first, second = (log_proxy, log_target) if direction == "proxy-first" else (log_target, log_proxy)
    return F.kl_div(second, first, reduction="none", log_target=True).sum(dim=1)
