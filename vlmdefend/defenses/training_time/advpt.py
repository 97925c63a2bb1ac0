"""AdvPT: a learned context, trained on the stored features of images that are adversarial for the image tower alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from vlmdefend.defenses.training_time import OBJECTIVES
from vlmdefend.defenses.training_time._adversarial import Adversarial, accuracy, cross_entropy, divergence
from vlmdefend.defenses.training_time._attack import ascend
from vlmdefend.defenses.training_time.base import PromptStudent, Schedule, StepCost, Student, Teacher, Terms
from vlmdefend.rng import ImageRng
from vlmdefend.types import Batch


@OBJECTIVES.register
@dataclass(frozen=True, kw_only=True)
class AdvPt(Adversarial):
    """Adversarial prompt tuning on stored features (Zhang et al. 2024). CAUTION: it holds against transfer alone.

    First, before the first step: for each training image, x_a maximises ``KL(softmax f(x) || softmax f(x_a))`` over the
    entries of the frozen image tower's features f, without labels or text; f(x_a) is stored, once. Then: the
    cross-entropy at these features, of which a context of 32 vectors learns (``--trains context:32``).

    The authors test it with the same attack, which sees neither the prompt nor the labels, and against that the new
    prompt helps. The image tower is the vanilla one: an attacker who differentiates the deployed model breaks it as
    before, as the first author's own later paper says. This is a cautionary row: compare an attack that saw the vanilla
    model alone with one that sees the deployed model (``worst``).

    Published: trained at 8/255 and tested at 16/255, batch 32, up to 100 epochs, the first of them at a rate of 1e-5,
    which is a linear warm-up here; weight decay 5e-4, their framework's default. The toys' text tower reads prompts of
    24 tokens, so they learn 16 vectors.
    """

    name: ClassVar[str] = "advpt"
    summary: ClassVar[str] = (
        "cautionary: a context learned on stored adversarial features; holds against transfer alone"
    )
    citation: ClassVar[str] = "Zhang et al. 2024"
    learns: ClassVar[tuple[str, ...]] = ("context", "class-context")
    schedule: ClassVar[Schedule | None] = Schedule(
        rate=2e-3,
        weight_decay=5e-4,
        batch_size=32,
        epochs=100,
        warm_up=None,
        dataset="imagenet",
        template="a photo of a {c}.",
        trains="context:32",
        toy_rate=0.1,
        toy_trains="context:16",
    )
    eps: float = 8 / 255
    steps: int = 10
    alpha: float = 1 / 255  # 1.25 eps / steps

    @property
    def cost(self) -> StepCost:
        """Returns one pass of the image tower before the first step."""
        return StepCost(forward_backwards=0, teacher_forwards=0, once=self.steps + 1)

    def stored(self, student: Student, batch: Batch, rng: ImageRng) -> Tensor:
        """Returns (B, D) features of the adversarial images, which are trained on in their place."""
        with torch.no_grad():
            clean = student.attacked_features(batch.images)

        def moved(pixels: Tensor) -> Tensor:
            return divergence(clean, student.attacked_features(pixels)).sum()

        adversarial = ascend(moved, batch.images, rng, eps=self.eps, steps=self.steps, alpha=self.alpha)
        with torch.no_grad():
            return student.attacked_features(adversarial)

    def losses(self, student: Student, teacher: Teacher | None, batch: Batch, rng: ImageRng) -> Terms:
        """Returns the cross-entropy per image.

        Args:
            batch: its ``images`` are what :meth:`stored` made of them, (B, D), or images still.
        """
        features = self.stored(student, batch, rng) if batch.images.dim() == 4 else batch.images
        logits = cast(PromptStudent, student).answers(features)
        return Terms(
            {"cross_entropy": cross_entropy(logits, batch.labels)},
            {"accuracy_adversarial": accuracy(logits, batch.labels)},
        )
