"""AT with pseudo-labels: adversarial training on the target, whose labels are the teacher's classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F

from vlmdefend.defenses.adaptation import ADAPTATIONS
from vlmdefend.defenses.adaptation._attack import ascend, away_from
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
class AtPl(Adaptation):
    """Cross-entropy of the teacher's class at PGD images of the target (a baseline of Wang et al. 2024).

    Options:
        eps: radius of the attack; alpha: its step; steps: how many.
    """

    name: ClassVar[str] = "at-pl"
    summary: ClassVar[str] = "adversarial training on the target with the teacher's classes"
    citation: ClassVar[str] = "Madry et al. 2018; Wang et al. 2024"
    role: ClassVar[Role] = "robustification"
    domains: ClassVar[Domains] = "target"
    teacher: ClassVar[TeacherKind] = "proxy"
    additive: ClassVar[bool] = True
    eps: Amplitude = 0.1
    alpha: Amplitude = 0.025
    steps: int = 10

    @property
    def cost(self) -> StepCost:
        """Returns the passes of the attack and of one update."""
        return StepCost(forward_backwards=self.steps + 1, teacher_forwards=1)

    def losses(self, student: Student, teacher: Teacher | None, batch: Batch, rng: ImageRng) -> Terms:
        """Returns the mean cross-entropy at the adversarial images."""
        trained, target = student_of(student), domains_of(batch).target
        labels = teacher_of(teacher).of(target).logits.argmax(dim=1)
        loss = away_from(trained.attacked, labels)
        adversarial = ascend(loss, target.images, eps=self.eps, alpha=self.alpha, steps=self.steps, rng=rng)
        logits = trained(adversarial).logits
        agreed = (logits.detach().argmax(dim=1) == labels).float().mean()
        return Terms(
            whole_batch_losses(batch, target=F.cross_entropy(logits, labels)),
            whole_batch_metrics(batch, teacher_agreement_adversarial=agreed),
        )
