"""ARTUDA: adversarial adaptation that counts the student's own adversarial target images as a third domain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from vlmdefend.defenses.adaptation import ADAPTATIONS
from vlmdefend.defenses.adaptation._attack import ascend, away_from
from vlmdefend.defenses.adaptation._domain import discriminator, domain_loss
from vlmdefend.defenses.adaptation._reversal import scheduled
from vlmdefend.defenses.adaptation.base import (
    Adaptation,
    Role,
    Shape,
    domains_of,
    features_of,
    split,
    student_of,
    whole_batch_losses,
    whole_batch_metrics,
)
from vlmdefend.defenses.training_time.base import StepCost, Student, Teacher, Terms
from vlmdefend.rng import ImageRng
from vlmdefend.types import Amplitude, Batch


@ADAPTATIONS.register
@dataclass(frozen=True, kw_only=True)
class Artuda(Adaptation):
    """CE(source) + DANN(source, target) + DANN(source, adversarial target) + KL(target || adversarial target).

    Lo & Patel 2022, eq. 8. The attack is PGD on the student's own class at the clean image; the clean side of the
    divergence is not detached. One discriminator serves both pairs.

    Options:
        trade_off: weight of each domain loss.
        consistency: weight of the divergence.
        eps: radius of the attack; alpha: its step; steps: how many.
        warm_up: iterations over which the reversal grows; None: a tenth of the stage.
    """

    name: ClassVar[str] = "artuda"
    summary: ClassVar[str] = "DANN with adversarial target images as a third domain"
    citation: ClassVar[str] = "Lo & Patel 2022"
    role: ClassVar[Role] = "robustification"
    additive: ClassVar[bool] = True
    trade_off: float = 1.0
    consistency: float = 1.0
    eps: Amplitude = 0.1
    alpha: Amplitude = 0.025
    steps: int = 10
    warm_up: int | None = None

    @property
    def cost(self) -> StepCost:
        """Returns the passes of the attack, of its labels, and of an update on both domains and adversarial images."""
        return StepCost(forward_backwards=self.steps + 3, teacher_forwards=0)

    def auxiliary(self, shape: Shape) -> dict[str, nn.Module]:
        """Returns the domain discriminator, which trains beside the classifier."""
        return {"discriminator": discriminator(shape.features)}

    def losses(self, student: Student, teacher: Teacher | None, batch: Batch, rng: ImageRng) -> Terms:
        """Returns the losses of one forward of source, target and adversarial images."""
        trained, (source, target) = student_of(student), domains_of(batch)
        count = len(source.ids)
        draws = rng.select(list(range(count, len(batch.ids))))
        with torch.no_grad():
            labels = trained.attacked(target.images).argmax(dim=1)
        loss = away_from(trained.attacked, labels)
        adversarial = ascend(loss, target.images, eps=self.eps, alpha=self.alpha, steps=self.steps, rng=draws)
        of_source, rest = split(trained(torch.cat([batch.images, adversarial])), count)
        clean, moved = split(rest, len(target.ids))
        coefficient = scheduled(trained, self.warm_up)
        network = trained.auxiliary["discriminator"]
        domain = domain_loss(network, features_of(of_source), features_of(clean), coefficient) + domain_loss(
            network, features_of(of_source), features_of(moved), coefficient
        )
        apart = F.kl_div(
            moved.logits.log_softmax(dim=1), clean.logits.log_softmax(dim=1), reduction="batchmean", log_target=True
        )
        losses = whole_batch_losses(
            batch,
            source=F.cross_entropy(of_source.logits, source.labels),
            domain=self.trade_off * domain,
            consistency=self.consistency * apart,
        )
        kept = (moved.logits.detach().argmax(dim=1) == labels).float().mean()
        return Terms(losses, whole_batch_metrics(batch, own_agreement_adversarial=kept))
