"""PMG-AFT: TeCoA with terms that keep predictions near the vanilla model's and near its own clean ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from vlmdefend.defenses.training_time import OBJECTIVES
from vlmdefend.defenses.training_time._adversarial import Adversarial, accuracy, cross_entropy, divergence
from vlmdefend.defenses.training_time.base import Schedule, StepCost, Student, Teacher, TeacherKind, Terms
from vlmdefend.rng import ImageRng
from vlmdefend.types import Batch


@OBJECTIVES.register
@dataclass(frozen=True, kw_only=True)
class PmgAft(Adversarial):
    """Pre-trained model guided adversarial fine-tuning (Wang et al. 2024).

    ``CE(l(x_a), y) + KL(p_0(x_a) || p(x_a)) + KL(p(x) || p(x_a))``: p_0 are the class probabilities of the vanilla
    model, at the adversarial image; p(x) are the model's own at the clean one, with their gradient, as in the code.

    Options:
        kl_reduction: ``batchmean``: both divergences are means over the batch, as the cross-entropy is: what the
            equations say. ``sum``: as in the code, they are sums beside a mean, and so weigh ``batch_size`` times as
            much; the result then depends on the batch size.
        batch_size: with ``sum``: images of a step; the last step of an epoch, which may have fewer, weighs them alike.
    """

    name: ClassVar[str] = "pmg-aft"
    summary: ClassVar[str] = "TeCoA held near the vanilla model's answers and its own clean ones"
    citation: ClassVar[str] = "Wang et al. 2024"
    teacher: ClassVar[TeacherKind] = "original"
    schedule: ClassVar[Schedule | None] = Schedule(
        rate=5e-5, batch_size=256, epochs=10, options={"kl_reduction": "sum", "batch_size": 256}
    )
    kl_reduction: Literal["batchmean", "sum"] = "batchmean"
    batch_size: int = 256

    @property
    def cost(self) -> StepCost:
        """Returns the passes of one step; the clean image is in the graph too."""
        return StepCost(forward_backwards=self.steps + 2, teacher_forwards=1)

    def losses(self, student: Student, teacher: Teacher | None, batch: Batch, rng: ImageRng) -> Terms:
        """Returns three terms per image."""
        assert teacher is not None
        adversarial = self.attacked(student, batch, rng)
        with torch.no_grad():
            before = teacher(adversarial).logits
        clean, found = student(batch.images).logits, student(adversarial).logits
        weight = self.batch_size if self.kl_reduction == "sum" else 1
        losses = {
            "cross_entropy": cross_entropy(found, batch.labels),
            "kl_original": weight * divergence(before, found),
            "kl_clean": weight * divergence(clean, found),
        }
        metrics = {
            "accuracy_adversarial": accuracy(found, batch.labels),
            "accuracy_clean": accuracy(clean, batch.labels),
        }
        return Terms(losses, metrics)
