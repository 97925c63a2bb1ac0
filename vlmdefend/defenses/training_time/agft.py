"""AGFT: TeCoA with the vanilla model's softened predictions in place of labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmdefend.defenses.training_time import OBJECTIVES
from vlmdefend.defenses.training_time._adversarial import Adversarial, accuracy
from vlmdefend.defenses.training_time.base import Schedule, Student, Teacher, TeacherKind, Terms
from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng
from vlmdefend.types import Batch


@OBJECTIVES.register
@dataclass(frozen=True, kw_only=True)
class Agft(Adversarial):
    """Alignment-guided fine-tuning (Cui et al. 2026).

    ``CE(l(x_a), softmax(r l_0(x)))``: l_0 are the vanilla model's logits at the clean image; x_a is PGD's on the same
    cross-entropy. Labels are read for the log alone. The authors train with a logit scale of 180, on both sides.

    Options:
        softness: r, 0.4 as published.
    """

    name: ClassVar[str] = "agft"
    summary: ClassVar[str] = "cross-entropy to the vanilla model's softened answers on the clean images"
    citation: ClassVar[str] = "Cui et al. 2026"
    teacher: ClassVar[TeacherKind] = "original"
    schedule: ClassVar[Schedule | None] = Schedule(rate=4e-4, batch_size=128, epochs=10, logit_scale=180.0)
    softness: float = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.softness < 0:
            raise UserError(f"agft: softness={self.softness} must be zero or more.")

    def losses(self, student: Student, teacher: Teacher | None, batch: Batch, rng: ImageRng) -> Terms:
        """Returns the cross-entropy per image."""
        assert teacher is not None
        with torch.no_grad():
            wanted = (self.softness * teacher(batch.images).logits).softmax(dim=1)

        def soft(logits: Tensor) -> Tensor:
            return -(wanted * logits.log_softmax(dim=1)).sum(dim=1)

        adversarial = self.ascended(lambda pixels: soft(student.attacked(pixels)).sum(), batch, rng)
        logits = student(adversarial).logits
        return Terms({"cross_entropy": soft(logits)}, {"accuracy_adversarial": accuracy(logits, batch.labels)})
