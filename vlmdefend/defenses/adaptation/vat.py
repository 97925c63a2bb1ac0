"""VAT: vanilla adversarial training on the labelled source."""

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
    whole_batch_losses,
    whole_batch_metrics,
)
from vlmdefend.defenses.training_time.base import StepCost, Student, Teacher, Terms
from vlmdefend.rng import ImageRng
from vlmdefend.types import Amplitude, Batch


@ADAPTATIONS.register
@dataclass(frozen=True, kw_only=True)
class Vat(Adaptation):
    """Cross-entropy at PGD images of the source (Madry et al. 2018); the target is not used.

    Options:
        eps: radius of the attack; alpha: its step; steps: how many.
    """

    name: ClassVar[str] = "vat"
    summary: ClassVar[str] = "adversarial training on the source"
    citation: ClassVar[str] = "Madry et al. 2018"
    role: ClassVar[Role] = "robustification"
    domains: ClassVar[Domains] = "source"
    additive: ClassVar[bool] = True
    eps: Amplitude = 0.1
    alpha: Amplitude = 0.025
    steps: int = 10

    @property
    def cost(self) -> StepCost:
        """Returns the passes of the attack and of one update."""
        return StepCost(forward_backwards=self.steps + 1, teacher_forwards=0)

    def losses(self, student: Student, teacher: Teacher | None, batch: Batch, rng: ImageRng) -> Terms:
        """Returns the mean cross-entropy at the adversarial images."""
        trained, source = student_of(student), domains_of(batch).source
        loss = away_from(trained.attacked, source.labels)
        adversarial = ascend(loss, source.images, eps=self.eps, alpha=self.alpha, steps=self.steps, rng=rng)
        logits = trained(adversarial).logits
        hits = (logits.detach().argmax(dim=1) == source.labels).float().mean()
        return Terms(
            whole_batch_losses(batch, source=F.cross_entropy(logits, source.labels)),
            whole_batch_metrics(batch, source_accuracy_adversarial=hits),
        )
