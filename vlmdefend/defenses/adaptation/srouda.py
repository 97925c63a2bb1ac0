"""SRoUDA: the student trains on the teacher's classes, the teacher on the student's resulting source error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from vlmdefend.defenses.adaptation import ADAPTATIONS
from vlmdefend.defenses.adaptation._attack import ascend, away_from
from vlmdefend.defenses.adaptation._changed import masked
from vlmdefend.defenses.adaptation.base import (
    Adaptation,
    AdaptedStudent,
    Role,
    Shape,
    domains_of,
    student_of,
    whole_batch_losses,
    whole_batch_metrics,
)
from vlmdefend.defenses.adaptation.self_training import confident_consistency
from vlmdefend.defenses.training_time.base import StepCost, Student, Teacher, Terms
from vlmdefend.rng import ImageRng
from vlmdefend.types import Amplitude, Batch

if TYPE_CHECKING:
    from vlmdefend.models.classifier.classifier import ImageClassifier


@ADAPTATIONS.register
@dataclass(frozen=True, kw_only=True)
class Srouda(Adaptation):
    """Meta self-training (Zhu et al. 2023, eqs. 5 to 9): both models train, alternately in one step.

    Student: PGD training on randomly masked target images with the teacher's classes at the plain ones. Teacher:
    CE(source) + consistency of the masked image with the plain one (probability above the threshold) + (new - old)
    CE(its class at the masked image), where old and new are the student's source error before and after a plain
    gradient step of rate ``look_ahead``; sign and defaults are those of the authors' code. The teacher's forward is a
    training one, as there. It hardly moves: at the student's rate it takes its own errors for the truth.

    Options:
        threshold: of the consistency.
        look_ahead: rate of the step that the feedback is measured with.
        teacher_rate: the teacher's learning rate, of the student's (theirs are 1e-7 and 1e-3).
        eps: radius of the attack; alpha: its step; steps: how many.
    """

    name: ClassVar[str] = "srouda"
    summary: ClassVar[str] = "adversarial self-training with a teacher that learns from the student"
    citation: ClassVar[str] = "Zhu et al. 2023"
    role: ClassVar[Role] = "robustification"
    threshold: float = 0.95
    look_ahead: float = 0.01
    teacher_rate: float = 1e-4
    eps: Amplitude = 0.1
    alpha: Amplitude = 0.025
    steps: int = 10

    @property
    def cost(self) -> StepCost:
        """Returns the attack, the student's step, its source error twice, and the teacher's three forwards."""
        return StepCost(forward_backwards=self.steps + 5, teacher_forwards=0)

    def auxiliary(self, shape: Shape) -> dict[str, nn.Module]:
        """Returns the teacher, initialised as the student."""
        return {"teacher": shape.copy()}

    @property
    def rates(self) -> dict[str, float]:
        """Returns the teacher's factor of the learning rate."""
        return {"teacher": self.teacher_rate}

    def losses(self, student: Student, teacher: Teacher | None, batch: Batch, rng: ImageRng) -> Terms:
        """Returns the losses of student and teacher, which train disjoint weights."""
        trained, (source, target) = student_of(student), domains_of(batch)
        draws = rng.select(list(range(len(source.ids), len(batch.ids))))
        tutor = cast("ImageClassifier", trained.auxiliary["teacher"])
        hidden = masked(target.images, draws.child("mask"))
        tutored = tutor.training_outputs(torch.cat([source.images, target.images, hidden])).logits
        of_source, (plain, of_hidden) = tutored[: len(source.ids)], tutored[len(source.ids) :].chunk(2)
        labels, own = plain.detach().argmax(dim=1), of_hidden.detach().argmax(dim=1)
        loss = away_from(trained.attacked, labels)
        adversarial = ascend(loss, hidden, eps=self.eps, alpha=self.alpha, steps=self.steps, rng=draws)
        moved = trained(adversarial).logits
        robust = F.cross_entropy(moved, labels)
        feedback = self._feedback(trained, robust, source)
        consistency, used = confident_consistency(plain, of_hidden, self.threshold)
        losses = whole_batch_losses(
            batch,
            target=robust,
            teacher_source=F.cross_entropy(of_source, source.labels),
            teacher_consistency=consistency,
            teacher_feedback=feedback * F.cross_entropy(of_hidden, own),
        )
        agreed = (moved.detach().argmax(dim=1) == labels).float().mean()
        return Terms(
            losses, whole_batch_metrics(batch, teacher_agreement_adversarial=agreed, share_used=used, feedback=feedback)
        )

    def _feedback(self, trained: AdaptedStudent, robust: Tensor, source: Batch) -> Tensor:
        """Returns by how much the student's source loss rose with its step, a number."""
        weights = dict(trained.classifier.named_parameters())
        gradients = torch.autograd.grad(robust, list(weights.values()), retain_graph=True, allow_unused=True)
        ahead = {
            name: weight if gradient is None else weight.detach() - self.look_ahead * gradient
            for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
        }
        with torch.no_grad():
            before = F.cross_entropy(trained.classifier(source.images).logits, source.labels)
            after = F.cross_entropy(functional_call(trained.classifier, ahead, (source.images,)).logits, source.labels)
        return after - before
