"""The base of adversarial fine-tuning methods: options of the training attack, and logged metrics."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from vlmdefend.defenses.training_time._attack import ascend, train_pgd
from vlmdefend.defenses.training_time.base import Objective, StepCost, Student
from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng
from vlmdefend.types import Batch, format_eps


@dataclass(frozen=True, kw_only=True)
class Adversarial(Objective, ABC):
    """An objective on PGD's images: every image gets every step, the last iterate counts, float32.

    Options:
        eps: radius of the training attack, in pixels of [0, 1].
        steps: of the training attack.
        alpha: its step size.
    """

    eps: float = 1 / 255
    steps: int = 2
    alpha: float = 1 / 255

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise UserError(f"{self.name}: steps={self.steps} must be zero or more.")

    @property
    def attack(self) -> str:
        """Returns the training attack in words."""
        return (
            f"{self.steps} steps, L_inf {format_eps(self.eps)}, alpha {format_eps(self.alpha)}, last iterate, float32"
        )

    @property
    def cost(self) -> StepCost:
        """Returns the passes: forward and backward per attack step and for the update, and a forward of any teacher."""
        return StepCost(forward_backwards=self.steps + 1, teacher_forwards=int(self.teacher != "none"))

    def attacked(self, student: Student, batch: Batch, rng: ImageRng) -> Tensor:
        """Returns PGD images that maximise the student's cross-entropy."""
        return train_pgd(
            student.attacked, batch.images, batch.labels, rng, eps=self.eps, steps=self.steps, alpha=self.alpha
        )

    def ascended(self, loss: Callable[[Tensor], Tensor], batch: Batch, rng: ImageRng) -> Tensor:
        """Returns PGD images that maximise any loss that is a sum over the images."""
        return ascend(loss, batch.images, rng, eps=self.eps, steps=self.steps, alpha=self.alpha)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns (B,) cross-entropies."""
    return F.cross_entropy(logits, labels, reduction="none")


def divergence(first: Tensor, second: Tensor) -> Tensor:
    """Returns (B,) KL(softmax(first) || softmax(second)) of (B, C) logits."""
    return F.kl_div(second.log_softmax(dim=1), first.log_softmax(dim=1), reduction="none", log_target=True).sum(dim=1)


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns (B,) 1 where the prediction is right; no gradient."""
    return (logits.detach().argmax(dim=1) == labels).float()
