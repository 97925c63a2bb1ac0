"""TRADES with pseudo-labels: cross-entropy of the teacher's class, and KL between clean and adversarial prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F

from vlmdefend.defenses.adaptation import ADAPTATIONS
from vlmdefend.defenses.adaptation._attack import ascend, away_from_prediction
from vlmdefend.defenses.adaptation.base import (
    Adaptation,
    Domains,
    Role,
    domains_of,
    student_of,
    teacher_of,
    whole_batch_losses,
    whole_batch_metrics,
)
from vlmdefend.defenses.training_time.base import StepCost, Student, Teacher, TeacherKind, Terms
from vlmdefend.rng import ImageRng
from vlmdefend.types import Amplitude, Batch


@ADAPTATIONS.register
@dataclass(frozen=True, kw_only=True)
class TradesPl(Adaptation):
    """Cross-entropy of the teacher's class, and beta KL(clean || adversarial) (Zhang et al. 2019, eq. 5).

    Options:
        beta: weight of the divergence.
        eps: radius of the attack on the divergence; alpha: its step; steps: how many.
    """

    name: ClassVar[str] = "trades-pl"
    summary: ClassVar[str] = "TRADES on the target with the teacher's classes"
    citation: ClassVar[str] = "Zhang et al. 2019; Wang et al. 2024"
    role: ClassVar[Role] = "robustification"
    domains: ClassVar[Domains] = "target"
    teacher: ClassVar[TeacherKind] = "proxy"
    additive: ClassVar[bool] = True
    beta: float = 6.0
    eps: Amplitude = 0.1
    alpha: Amplitude = 0.025
    steps: int = 10

    @property
    def cost(self) -> StepCost:
        """Returns the passes of the attack and of two updates."""
        return StepCost(forward_backwards=self.steps + 2, teacher_forwards=1)

    def losses(self, student: Student, teacher: Teacher | None, batch: Batch, rng: ImageRng) -> Terms:
        """Returns the clean and the adversarial term."""
        trained, target = student_of(student), domains_of(batch).target
        labels = teacher_of(teacher).of(target).logits.argmax(dim=1)
        loss = away_from_prediction(trained.attacked, target.images)
        adversarial = ascend(loss, target.images, eps=self.eps, alpha=self.alpha, steps=self.steps, rng=rng)
        clean, moved = trained(target.images).logits, trained(adversarial).logits
        apart = F.kl_div(moved.log_softmax(dim=1), clean.log_softmax(dim=1), reduction="batchmean", log_target=True)
        losses = whole_batch_losses(batch, target=F.cross_entropy(clean, labels), robustness=self.beta * apart)
        agreed = (moved.detach().argmax(dim=1) == labels).float().mean()
        return Terms(losses, whole_batch_metrics(batch, teacher_agreement_adversarial=agreed))
