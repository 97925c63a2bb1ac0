"""Sim-CLIP: FARE with cosines; its paper has no frozen model, its code has one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F

from vlmdefend.defenses.training_time import OBJECTIVES
from vlmdefend.defenses.training_time._adversarial import Adversarial, accuracy
from vlmdefend.defenses.training_time.base import Schedule, StepCost, Student, Teacher, TeacherKind, Terms
from vlmdefend.rng import ImageRng
from vlmdefend.types import Batch

Variant = Literal["code", "paper"]


@OBJECTIVES.register
@dataclass(frozen=True, kw_only=True)
class SimClip(Adversarial):
    """Siamese adversarial fine-tuning (Hossain and Imteaj 2024, eq. 6). No labels, no text.

    Attacked is the squared distance of the features to the vanilla model's on the clean image, as in FARE.

    Options:
        variant: ``code``: -1/2 cos(f(x_a), f_0(x)). The authors' second term, -1/2 cos(f_0(x), f(x_a)) with the
            gradient stopped at f(x_a), has none left, since f_0 is frozen; it is left out here. ``paper``: both terms
            with the model in training on either side, -1/2 cos(f(x_a), [f(x)]) - 1/2 cos(f(x), [f(x_a)]), gradients
            stopped in brackets: nothing then ties it to the vanilla features, and a constant is a minimum.

    The authors' readme has rate 1e-3, their file 1e-5; the latter is taken, since full fine-tuning at 1e-3 is not
    plausible. Their 10,000 steps are half an epoch of ImageNet, and one epoch the least that is trained here.
    """

    name: ClassVar[str] = "sim-clip"
    summary: ClassVar[str] = "cosine of the features on adversarial and clean images"
    citation: ClassVar[str] = "Hossain and Imteaj 2024"
    teacher: ClassVar[TeacherKind] = "original"
    schedule: ClassVar[Schedule | None] = Schedule(
        optimizer="adamw",
        rate=1e-5,
        weight_decay=1e-5,
        batch_size=64,
        epochs=1,
        warm_up=1400,
        dataset="imagenet",
        toy_options={"steps": 5},
    )
    eps: float = 4 / 255
    steps: int = 10
    alpha: float = 1 / 255
    variant: Variant = "code"

    @property
    def cost(self) -> StepCost:
        """Returns the passes of one step; in the paper's form the clean image is in the graph too."""
        return StepCost(forward_backwards=self.steps + 1 + (self.variant == "paper"), teacher_forwards=1)

    def losses(self, student: Student, teacher: Teacher | None, batch: Batch, rng: ImageRng) -> Terms:
        """Returns half the negative cosine per image."""
        assert teacher is not None
        with torch.no_grad():
            before = teacher(batch.images).features
        assert before is not None
        wanted = before
        adversarial = self.ascended(
            lambda pixels: (student.attacked_features(pixels) - wanted).square().sum(), batch, rng
        )
        found = student(adversarial)
        assert found.features is not None
        metrics = {"accuracy_adversarial": accuracy(found.logits, batch.labels)}
        if self.variant == "code":
            return Terms({"cosine": -0.5 * F.cosine_similarity(found.features, wanted)}, metrics)
        clean = student(batch.images).features
        assert clean is not None
        losses = {
            "cosine_adversarial": -0.5 * F.cosine_similarity(found.features, clean.detach()),
            "cosine_clean": -0.5 * F.cosine_similarity(clean, found.features.detach()),
        }
        return Terms(losses, metrics)
