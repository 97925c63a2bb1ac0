"""FAP: deep prompts of both towers that keep adversarial predictions near the clean ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from vlmdefend.defenses.training_time import OBJECTIVES
from vlmdefend.defenses.training_time._adversarial import Adversarial, accuracy, cross_entropy, divergence
from vlmdefend.defenses.training_time._attack import ascend
from vlmdefend.defenses.training_time.base import Schedule, StepCost, Student, Teacher, Terms
from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng
from vlmdefend.types import Batch


@OBJECTIVES.register
@dataclass(frozen=True, kw_only=True)
class Fap(Adversarial):
    """Few-shot adversarial prompt learning (Zhou et al. 2024, as in their code).

    ``CE(l(x), y) + w KL(p(x) || p(x_a)) (1 + cos(z(x), z(x_a)))`` per image, with the gradient of both sides of the
    divergence and of the cosine; x_a maximises the divergence. What trains (``--trains deep:2``) are two vectors in
    place of "a photo" of the template, two tokens in the image tower, and others in their place at each of the first
    nine blocks, or as many as a tower has; the text tower's are linear maps of the image tower's. The image tower must
    be a vision transformer; all weights are frozen, and vanilla ones as published. Users report that EuroSAT collapses
    at w = 1.5.

    Published: 16 images of each class (``--limit``: 16 times the classes), batch 4, 10 epochs, the first of them at a
    rate of 1e-5, which is a linear warm-up here; half precision, here float32. Weight decay is 5e-4, the default of
    their framework. Their code begins at the template with its braces and full stop ("a photo of a {}. cat."); here at
    the prompt as it is meant.

    Options:
        weight: w.
    """

    name: ClassVar[str] = "fap"
    summary: ClassVar[str] = "deep prompts of both towers; clean cross-entropy and a cosine-aware divergence (ViT only)"
    citation: ClassVar[str] = "Zhou et al. 2024"
    learns: ClassVar[tuple[str, ...]] = ("deep",)
    schedule: ClassVar[Schedule | None] = Schedule(
        rate=3.5e-3,
        weight_decay=5e-4,
        batch_size=4,
        epochs=10,
        warm_up=None,
        dataset="imagenet",
        template="a photo of a {c}.",
        trains="deep:2",
        toy_rate=0.1,
    )
    weight: float = 1.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight < 0:
            raise UserError(f"fap: weight={self.weight} must be zero or more.")

    @property
    def cost(self) -> StepCost:
        """Returns the passes of one step; the clean image is in the graph too, and the attack uses its forward."""
        return StepCost(forward_backwards=self.steps + 2, teacher_forwards=0)

    def losses(self, student: Student, teacher: Teacher | None, batch: Batch, rng: ImageRng) -> Terms:
        """Returns two terms per image."""
        clean = student(batch.images)
        reference = clean.logits.detach()

        def moved(pixels: Tensor) -> Tensor:
            return divergence(reference, student.attacked(pixels)).sum()

        adversarial = ascend(moved, batch.images, rng, eps=self.eps, steps=self.steps, alpha=self.alpha)
        found = student(adversarial)
        assert clean.features is not None
        assert found.features is not None
        price = 1 + F.cosine_similarity(clean.features, found.features)
        losses = {
            "cross_entropy": cross_entropy(clean.logits, batch.labels),
            "divergence": self.weight * divergence(clean.logits, found.logits) * price,
        }
        metrics = {
            "accuracy_adversarial": accuracy(found.logits, batch.labels),
            "accuracy_clean": accuracy(clean.logits, batch.labels),
        }
        return Terms(losses, metrics)
