"""FARE: keeps the features of adversarial images at those of the clean images; no labels, no text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlmdefend.defenses.training_time import OBJECTIVES
from vlmdefend.defenses.training_time._adversarial import Adversarial, accuracy
from vlmdefend.defenses.training_time.base import Schedule, Student, Teacher, TeacherKind, Terms
from vlmdefend.rng import ImageRng
from vlmdefend.types import Batch


@OBJECTIVES.register
@dataclass(frozen=True, kw_only=True)
class Fare(Adversarial):
    """Unsupervised adversarial fine-tuning (Schlarmann et al. 2024, eq. 3).

    ``|| f(x_a) - f_0(x) ||^2``, features not normalised, summed over their D entries; x_a is PGD's on that
    distance. Its start is random, and must be: at the vanilla model's clean image the distance has no gradient. Labels
    are read for the log alone.

    Their attack has momentum 0.9, but of signs that are signed again at every step: what is left is the sign of the
    present gradient, plain PGD, as here.
    """

    name: ClassVar[str] = "fare"
    summary: ClassVar[str] = "features on adversarial images drawn to the vanilla model's on the clean ones"
    citation: ClassVar[str] = "Schlarmann et al. 2024"
    teacher: ClassVar[TeacherKind] = "original"
    schedule: ClassVar[Schedule | None] = Schedule(
        optimizer="adamw",
        rate=1e-5,
        weight_decay=1e-4,
        batch_size=128,
        epochs=2,
        warm_up=1400,
        dataset="imagenet",
        toy_options={"steps": 5},
    )
    eps: float = 4 / 255
    steps: int = 10
    alpha: float = 1 / 255

    def losses(self, student: Student, teacher: Teacher | None, batch: Batch, rng: ImageRng) -> Terms:
        """Returns the squared distance per image."""
        assert teacher is not None
        with torch.no_grad():
            before = teacher(batch.images).features
        assert before is not None
        wanted = before  # a name that stays narrowed inside the closure
        adversarial = self.ascended(
            lambda pixels: (student.attacked_features(pixels) - wanted).square().sum(), batch, rng
        )
        found = student(adversarial)
        assert found.features is not None
        distance = (found.features - wanted).square().sum(dim=1)
        return Terms({"distance": distance}, {"accuracy_adversarial": accuracy(found.logits, batch.labels)})
