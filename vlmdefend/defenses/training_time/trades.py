"""TRADES: clean cross-entropy plus the divergence of the adversarial prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlmdefend.defenses.training_time import OBJECTIVES
from vlmdefend.defenses.training_time._adversarial import Adversarial, accuracy, cross_entropy, divergence
from vlmdefend.defenses.training_time._attack import ascend
from vlmdefend.defenses.training_time.base import Schedule, StepCost, Student, Teacher, Terms
from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng
from vlmdefend.types import Batch

START = 0.001  # radius of the start around the image; theirs is a normal number of this deviation, ours uniform


@OBJECTIVES.register
@dataclass(frozen=True, kw_only=True)
class Trades(Adversarial):
    """Baseline: ``CE(l(x), y) + beta KL(p(x) || p(x_a))``, x_a maximising the divergence (Zhang et al. 2019, eq. 5).

    For CLIP there is no published run: its schedule here is TeCoA's.

    Options:
        beta: the price, 6 as for CIFAR-10.
    """

    name: ClassVar[str] = "trades"
    summary: ClassVar[str] = "clean cross-entropy and the divergence of adversarial from clean answers"
    citation: ClassVar[str] = "Zhang et al. 2019"
    schedule: ClassVar[Schedule | None] = Schedule(rate=1e-5, batch_size=256, epochs=10)
    beta: float = 6.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta < 0:
            raise UserError(f"trades: beta={self.beta} must be zero or more.")

    @property
    def cost(self) -> StepCost:
        """Returns the passes of one step; the clean image is in the graph too, and the attack uses its forward."""
        return StepCost(forward_backwards=self.steps + 2, teacher_forwards=0)

    def losses(self, student: Student, teacher: Teacher | None, batch: Batch, rng: ImageRng) -> Terms:
        """Returns two terms per image."""
        clean = student(batch.images).logits
        reference = clean.detach()

        def moved(pixels: Tensor) -> Tensor:
            return divergence(reference, student.attacked(pixels)).sum()

        adversarial = ascend(
            moved, batch.images, rng, eps=self.eps, steps=self.steps, alpha=self.alpha, start=min(START, self.eps)
        )
        found = student(adversarial).logits
        losses = {
            "cross_entropy": cross_entropy(clean, batch.labels),
            "divergence": self.beta * divergence(clean, found),
        }
        metrics = {
            "accuracy_adversarial": accuracy(found, batch.labels),
            "accuracy_clean": accuracy(clean, batch.labels),
        }
        return Terms(losses, metrics)
