"""TGA-ZSR: TeCoA with a term that keeps text-guided attention maps unchanged."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmdefend.defenses.training_time import OBJECTIVES
from vlmdefend.defenses.training_time._adversarial import Adversarial, accuracy, cross_entropy
from vlmdefend.defenses.training_time.base import (
    Schedule,
    SpatialTeacher,
    StepCost,
    Student,
    Teacher,
    TeacherKind,
    Terms,
)
from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng
from vlmdefend.types import Batch

PUBLISHED_SIDE = 224


@OBJECTIVES.register
@dataclass(frozen=True, kw_only=True)
class TgaZsr(Adversarial):
    """Text-guided attention for zero-shot robustness (Yu et al. 2024, eqs. 5 to 8).

    ``CE(l(x_a), y) + a || A(x_a) - A_0(x) || + b || A(x) - A_0(x) ||`` per image; A_0 is the vanilla model's. The map
    A(x) is the dot product of each patch token, after the last norm and the projection, with the text feature of the
    true class, stretched to [0, 1] over the image and enlarged to its size. A ResNet of CLIP has no patch tokens: its
    map is of the places of its last feature map, each sent through the value and output projections of the attention
    pool. The authors define theirs for transformers only. A tower of a single place has a map of zeros.

    The norm of a map of S x S pixels grows with S, and a and b are for 224: elsewhere norms are multiplied by 224/S.

    Options:
        adversarial_weight: a.
        clean_weight: b.
        token_norm: divide the D entries of the tokens by their norm over the tokens, as the authors' code does in the
            place of each token's own norm. False: tokens as they are.
    """

    name: ClassVar[str] = "tga-zsr"
    summary: ClassVar[str] = "TeCoA with text-guided attention maps kept where they were"
    citation: ClassVar[str] = "Yu et al. 2024"
    teacher: ClassVar[TeacherKind] = "original"
    schedule: ClassVar[Schedule | None] = Schedule(rate=1e-4, batch_size=128, epochs=10)
    adversarial_weight: float = 0.08
    clean_weight: float = 0.05
    token_norm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adversarial_weight < 0 or self.clean_weight < 0:
            raise UserError(
                f"tga-zsr: adversarial_weight={self.adversarial_weight} and clean_weight={self.clean_weight} must be "
                "zero or more."
            )

    @property
    def cost(self) -> StepCost:
        """Returns the passes of one step; the clean image is in the graph too."""
        return StepCost(forward_backwards=self.steps + 2, teacher_forwards=1)

    def losses(self, student: Student, teacher: Teacher | None, batch: Batch, rng: ImageRng) -> Terms:
        """Returns three terms per image."""
        original = cast(SpatialTeacher, teacher)
        adversarial = self.attacked(student, batch, rng)
        side, classes = batch.images.shape[-1], student.class_features[batch.labels]  # (B, D)

        def attention(patches: Tensor) -> Tensor:
            return attention_map(patches, classes, side, token_norm=self.token_norm)

        with torch.no_grad():
            before = attention(original.with_patches(batch.images)[1])
        found, patches = student.with_patches(adversarial)
        clean, clean_patches = student.with_patches(batch.images)
        losses = {
            "cross_entropy": cross_entropy(found.logits, batch.labels),
            "attention_adversarial": self.adversarial_weight * map_distance(attention(patches), before),
            "attention_clean": self.clean_weight * map_distance(attention(clean_patches), before),
        }
        metrics = {
            "accuracy_adversarial": accuracy(found.logits, batch.labels),
            "accuracy_clean": accuracy(clean.logits, batch.labels),
        }
        return Terms(losses, metrics)


def attention_map(patches: Tensor, classes: Tensor, side: int, *, token_norm: bool = False) -> Tensor:
    """Returns (B, side, side) maps in [0, 1] of (B, N, D) tokens of a square grid and (B, D) class features."""
    if token_norm:
        patches = F.normalize(patches, dim=1)
    grid = math.isqrt(patches.shape[1])
    agreement = torch.einsum("bnd,bd->bn", patches, classes)
    low, high = agreement.aminmax(dim=1, keepdim=True)
    stretched = (agreement - low) / (high - low).clamp_min(1e-6)
    enlarged = F.interpolate(stretched.view(-1, 1, grid, grid), size=(side, side), mode="bilinear")
    return enlarged.squeeze(1)


def map_distance(first: Tensor, second: Tensor) -> Tensor:
    """Returns (B,) Euclidean distances of two (B, S, S) maps, scaled to maps of 224 x 224."""
    squares = (first - second).square().flatten(1).sum(dim=1)
    # the square root has no gradient at 0, where the two maps are one: as at the first step of every run
    length = torch.where(squares > 0, squares.clamp_min(1e-12).sqrt(), squares)
    return length * (PUBLISHED_SIDE / first.shape[-1])
