"""AdvCLIP-LoRA: low-rank updates of both towers, trained on images that share one perturbation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vlmdefend.defenses.training_time import OBJECTIVES
from vlmdefend.defenses.training_time._adversarial import Adversarial, accuracy, cross_entropy
from vlmdefend.defenses.training_time.base import Schedule, Student, Teacher, Terms
from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng
from vlmdefend.types import Batch, format_eps

DELTA = "delta"
SETTLED = 300  # steps of the run after which the step size of the ascent is the rate itself


@OBJECTIVES.register
@dataclass(frozen=True, kw_only=True)
class AdvLora(Adversarial):
    """Few-shot adversarial low-rank fine-tuning (Ghiasvand et al. 2025, as in their code).

    ``min over A, B, max over delta of the mean of CE(l(x_i + delta), y_i)``: A and B are the factors of LoRA (rank 2,
    alpha 1 over the root of the rank, dropout 0.25) on query, key and value of every attention of both towers, which
    is ``--trains lora-all:2:0.25``, the default of this method; class features are encoded anew because the text
    tower trains.

    ``perturbation=universal`` is the code: one delta for the whole batch, carried from batch to batch of an epoch,
    which takes ``steps`` steps along the gradient itself, not its sign. One would expect a perturbation of each image:
    ``per-image`` is PGD as elsewhere here. A universal one of 1/255 is a weak attack, and what is learned against it is
    not robustness against attacks on single images: of 200 ``fashion`` images the embedded ViT held 20 % under PGD-10
    at 8/255 before, 20 % after two epochs of it, and 40 % after two of ``per-image``.

    Theirs perturbs, clips and tests pixels that are already normalised, where 1/255 is about a quarter of a level of
    an image; here 1/255 is of pixels in [0, 1], and perturbed images stay in it. They crop and flip images at random:
    ``--augment crop-flip``, which ``--profile paper`` takes. 16 images of each class of ImageNet (``--limit 16000``)
    for 16 epochs are their 8,000 steps.

    Options:
        perturbation: ``universal`` or ``per-image``.
        ascent: step size of the universal one per unit of gradient. In the first 300 steps of a run it is larger, by
            1 / ||delta|| at first: the very first step from delta = 0 leads to the corner of the box.
    """

    name: ClassVar[str] = "adv-lora"
    summary: ClassVar[str] = "low-rank updates of both towers under one perturbation for all images"
    citation: ClassVar[str] = "Ghiasvand et al. 2025"
    schedule: ClassVar[Schedule | None] = Schedule(
        optimizer="adamw",
        rate=2e-4,
        weight_decay=1e-2,
        batch_size=32,
        epochs=16,
        warm_up=0,
        dataset="imagenet",
        template="a photo of a {c}.",
        trains="lora-all:2:0.25",
        augment="crop-flip",
        toy_optimizer="adamw",
    )
    perturbation: Literal["universal", "per-image"] = "universal"
    ascent: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ascent < 0:
            raise UserError(f"adv-lora: ascent={self.ascent} must be zero or more.")

    @property
    def whole_batch(self) -> bool:
        """True: one perturbation is shared by all images."""
        return self.perturbation == "universal"

    @property
    def attack(self) -> str:
        """Returns the training attack in words: shared or per image."""
        if self.perturbation == "per-image":
            return super().attack
        return (
            f"one perturbation for all images, {self.steps} steps of {self.ascent:g} along its gradient, "
            f"L_inf {format_eps(self.eps)}, float32"
        )

    def losses(self, student: Student, teacher: Teacher | None, batch: Batch, rng: ImageRng) -> Terms:
        """Returns the cross-entropy per image."""
        if self.perturbation == "universal":
            adversarial = shifted(batch.images, self._risen(student, batch))
        else:
            adversarial = self.attacked(student, batch, rng)
        logits = student(adversarial).logits
        return Terms(
            {"cross_entropy": cross_entropy(logits, batch.labels)},
            {"accuracy_adversarial": accuracy(logits, batch.labels)},
        )

    def _risen(self, student: Student, batch: Batch) -> Tensor:
        """Returns the (3, H, W) perturbation after the steps of this batch, from which the next batch starts."""
        delta = student.carried.get(DELTA)
        if delta is None:
            delta = torch.zeros_like(batch.images[0])
        for _ in range(self.steps):
            delta = delta.detach().requires_grad_(True)
            with torch.enable_grad():
                loss = cross_entropy(student.attacked(shifted(batch.images, delta)), batch.labels).mean()
            (gradient,) = torch.autograd.grad(loss, delta)
            size = self.ascent * step_size(float(delta.detach().norm()), student.iteration)
            delta = (delta.detach() + size * gradient).clamp(-self.eps, self.eps)
        student.carried[DELTA] = delta
        return delta


def shifted(images: Tensor, delta: Tensor) -> Tensor:
    """Adds (3, H, W) to all (B, 3, H, W) images, inside [0, 1]."""
    return (images + delta).clamp(0.0, 1.0)


def step_size(length: float, iteration: int) -> float:
    """From 1 over the length of the perturbation to 1, as ``1 / (300 - iteration)`` goes to 1."""
    if iteration >= SETTLED:
        return 1.0
    first = 1.0 / (length + 1e-30)
    return first + (1.0 - first) / (SETTLED - iteration)
