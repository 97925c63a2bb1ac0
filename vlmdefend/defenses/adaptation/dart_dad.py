"""DART-DAD: adversarial target images that raise both the error and the divergence of the domains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmdefend.defenses.adaptation import ADAPTATIONS
from vlmdefend.defenses.adaptation._attack import ascend
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
    teacher_of,
    whole_batch_losses,
    whole_batch_metrics,
)
from vlmdefend.defenses.training_time.base import StepCost, Student, Teacher, TeacherKind, Terms
from vlmdefend.rng import ImageRng
from vlmdefend.types import Amplitude, Batch


@ADAPTATIONS.register
@dataclass(frozen=True, kw_only=True)
class DartDad(Adaptation):
    """Divergence aware adversarial training (Wang et al. 2024, eq. 9) with DANN as the divergence, clean source.

    min over weights, max over target perturbations of CE(source) + l1 CE(adversarial target, pseudo-label) - l CE_disc.
    Not the DART of Huang et al. (that is dart-urda): of that name, in tables before 2026, this one is meant.

    Options:
        pseudo: weight l1; divergence: weight l. The paper searches both in [0.1, 10].
        eps: radius of the attack; alpha: its step; steps: how many.
        warm_up: iterations over which the reversal grows; None: a tenth of the stage.
    """

    name: ClassVar[str] = "dart-dad"
    summary: ClassVar[str] = "divergence aware adversarial training, on both domains"
    citation: ClassVar[str] = "Wang et al. 2024"
    role: ClassVar[Role] = "robustification"
    teacher: ClassVar[TeacherKind] = "proxy"
    additive: ClassVar[bool] = True
    pseudo: float = 1.0
    divergence: float = 1.0
    eps: Amplitude = 0.1
    alpha: Amplitude = 0.025
    steps: int = 10
    warm_up: int | None = None

    @property
    def cost(self) -> StepCost:
        """Returns the passes of the attack and of one update on both domains."""
        return StepCost(forward_backwards=self.steps + 2, teacher_forwards=1)

    def auxiliary(self, shape: Shape) -> dict[str, nn.Module]:
        """Returns the domain discriminator, which trains beside the classifier."""
        return {"discriminator": discriminator(shape.features)}

    def losses(self, student: Student, teacher: Teacher | None, batch: Batch, rng: ImageRng) -> Terms:
        """Returns the losses of one forward of source and adversarial target images."""
        trained, (source, target) = student_of(student), domains_of(batch)
        count, network = len(source.ids), trained.auxiliary["discriminator"]
        draws = rng.select(list(range(count, len(batch.ids))))
        labels = teacher_of(teacher).of(target).logits.argmax(dim=1)

        def raised(moved: Tensor) -> Tensor:
            outputs = trained.evaluated(moved)
            told_apart = F.binary_cross_entropy_with_logits(
                network(features_of(outputs))[:, 0], moved.new_zeros(len(moved)), reduction="sum"
            )
            wrong = F.cross_entropy(outputs.logits, labels, reduction="sum")
            return self.pseudo * wrong - self.divergence * 0.5 * told_apart

        adversarial = ascend(raised, target.images, eps=self.eps, alpha=self.alpha, steps=self.steps, rng=draws)
        of_source, moved = split(trained(torch.cat([source.images, adversarial])), count)
        coefficient = scheduled(trained, self.warm_up)
        domain = domain_loss(network, features_of(of_source), features_of(moved), coefficient)
        losses = whole_batch_losses(
            batch,
            source=F.cross_entropy(of_source.logits, source.labels),
            target=self.pseudo * F.cross_entropy(moved.logits, labels),
            domain=self.divergence * domain,
        )
        agreed = (moved.logits.detach().argmax(dim=1) == labels).float().mean()
        return Terms(losses, whole_batch_metrics(batch, teacher_agreement_adversarial=agreed))
