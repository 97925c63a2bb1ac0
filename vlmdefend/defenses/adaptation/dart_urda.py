"""DART: distils a frozen adapted teacher into a student on target images, at clean and adversarial pixels."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmdefend.defenses.adaptation import ADAPTATIONS
from vlmdefend.defenses.adaptation._attack import ascend, away_from
from vlmdefend.defenses.adaptation._changed import cropped, weakly
from vlmdefend.defenses.adaptation.base import (
    Adaptation,
    AdaptedStudent,
    Domains,
    Role,
    domains_of,
    features_of,
    student_of,
    teacher_of,
    whole_batch_losses,
)
from vlmdefend.defenses.training_time.base import StepCost, Student, Teacher, TeacherKind, Terms
from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng
from vlmdefend.types import Batch, Outputs, PixelUnits

WeightReduction = Literal["released", "sum", "mean"]
Space = Literal["pixel", "released"]
Augmentation = Literal["off", "shift", "crop", "crop-flip"]
AUGMENTATIONS: dict[Augmentation, Callable[[Tensor, ImageRng], Tensor]] = {
    "off": lambda images, rng: images,
    "shift": weakly,
    "crop": lambda images, rng: cropped(images, rng, flip=False),
    "crop-flip": lambda images, rng: cropped(images, rng, flip=True),
}
INSIDE_LOG = 1e-5  # the release's guard: a sure prediction gets 1.0000072, an even one 2.9e-5


@ADAPTATIONS.register
@dataclass(frozen=True, kw_only=True)
class DartUrda(Adaptation):
    """Disentangled adversarial robustness training (Huang et al. 2026), step 2, as their released code computes it.

    The attack is a BIM on the student against the teacher's class; three terms draw the student to the teacher: its
    prediction at the adversarial image, its prediction at the clean one, its clean bottleneck features.

    Options:
        reduction: of the two distillations: ``released``: mean divergence times summed weight (grows with the batch),
            ``sum`` or ``mean`` of weight times divergence, image by image.
        trade_off: weight of the distillations (lambda). 0.1 as released; with ``mean``, 1.8 is of the same size.
        temperature: of the distillations; no factor of its square.
        eps: radius of the attack; alpha: its step; steps: how many. In pixels, or normalised with ``space=released``.
        space: ``pixel``; or ``released``: the attack moves normalised images and clips them to [0, 1], as the code does
            (a defect: most of the image moves by more than eps). For reproduction only.
        defense: the term at the adversarial image; prediction: at the clean one; features: of the features.
        entropy_weight: weigh images by the teacher's certainty.
        augment: of target images, what teacher and student both see: ``off``, ``shift``, ``crop``, ``crop-flip``.
    """

    name: ClassVar[str] = "dart-urda"
    summary: ClassVar[str] = "disentangled adversarial robustness training on target images, from any adapted teacher"
    citation: ClassVar[str] = "Huang et al. 2026"
    role: ClassVar[Role] = "robustification"
    domains: ClassVar[Domains] = "target"
    teacher: ClassVar[TeacherKind] = "proxy"
    additive: ClassVar[bool] = True
    weight_reduction: WeightReduction = "mean"
    trade_off: float = 1.8
    temperature: float = 2.0
    eps: PixelUnits = 0.1
    alpha: PixelUnits = 0.05
    steps: int = 10
    space: Space = "pixel"
    defense: bool = True
    prediction: bool = True
    features: bool = True
    entropy_weight: bool = True
    augment: Augmentation = "off"

    def __post_init__(self) -> None:
        if not (self.defense or self.prediction or self.features):
            raise UserError("dart-urda: all three terms are switched off; leave one of them on.")

    @property
    def whole_batch(self) -> bool:
        """True unless the distillation losses are means, whose size does not depend on the batch."""
        return self.weight_reduction != "mean"

    @property
    def cost(self) -> StepCost:
        """Returns a forward and backward per attack step, and one for each of the two student forwards."""
        return StepCost(forward_backwards=(self.steps + 1 if self.defense else 0) + 1, teacher_forwards=1)

    def losses(self, student: Student, teacher: Teacher | None, batch: Batch, rng: ImageRng) -> Terms:
        """Returns the three terms; metrics: agreement with the teacher's class on clean and adversarial images."""
        trained, target = student_of(student), domains_of(batch).target
        if self.augment == "off":
            images, targets = target.images, teacher_of(teacher).of(target)
        else:
            images = AUGMENTATIONS[self.augment](target.images, rng.child("augment"))
            targets = teacher_of(teacher)(images)
        labels = targets.logits.argmax(dim=1)
        weights = certainty(targets.logits) if self.entropy_weight else torch.ones_like(targets.logits[:, 0])
        adversarial = self._attacked(trained, images, labels) if self.defense else None
        clean = trained(images)
        agreed = {"teacher_agreement_clean": (clean.logits.detach().argmax(dim=1) == labels).float()}
        losses: dict[str, Tensor] = {}
        if adversarial is not None:
            moved = trained(adversarial)
            losses["defense"] = self._distilled(targets.logits, moved.logits, weights)
            agreed["teacher_agreement_adversarial"] = (moved.logits.detach().argmax(dim=1) == labels).float()
        if self.prediction:
            losses["prediction"] = self._distilled(targets.logits, clean.logits, weights)
        if self.features:
            losses["features"] = feature_loss(clean, targets)
        return Terms(whole_batch_losses(batch, **losses), {**agreed, "certainty": weights})

    def _distilled(self, teacher: Tensor, student: Tensor, weights: Tensor) -> Tensor:
        divergence = divergences(teacher, student, self.temperature)
        return self.trade_off * reduced(divergence, weights, self.weight_reduction)

    def _attacked(self, student: AdaptedStudent, images: Tensor, labels: Tensor) -> Tensor:
        """Returns the adversarial images, as pixels."""
        if self.space == "pixel":
            loss = away_from(student.attacked, labels)
            return ascend(loss, images, eps=self.eps, alpha=self.alpha, steps=self.steps)
        mean, std = student.classifier.mean, student.classifier.std
        loss = away_from(lambda moved: student.attacked(moved * std + mean), labels)
        normalised = (images - mean) / std
        return ascend(loss, normalised, eps=self.eps, alpha=self.alpha, steps=self.steps) * std + mean


class DartTerms(NamedTuple):
    """The three terms of one batch, unweighted by the trade-off, and their total."""

    defense: Tensor
    prediction: Tensor
    features: Tensor
    total: Tensor


def dart_terms(
    teacher: Outputs,
    clean: Outputs,
    adversarial: Tensor,
    *,
    trade_off: float = 0.1,
    temperature: float = 2.0,
    reduction: WeightReduction = "released",
) -> DartTerms:
    """Computes the release's loss from given outputs, for tests and for other training loops."""
    weights = certainty(teacher.logits)
    defense = reduced(divergences(teacher.logits, adversarial, temperature), weights, reduction)
    prediction = reduced(divergences(teacher.logits, clean.logits, temperature), weights, reduction)
    features = feature_loss(clean, teacher)
    return DartTerms(defense, prediction, features, trade_off * (defense + prediction) + features)


def certainty(logits: Tensor) -> Tensor:
    """Returns (B,) 1 - normalised entropy, in [0, 1], of (B, C) teacher logits."""
    p = logits.softmax(dim=1)
    entropy = -(p * (p + INSIDE_LOG).log()).sum(dim=1) / math.log(logits.shape[1])
    return (1.0 - entropy).clamp(0.0, 1.0)


def divergences(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """Returns (B,) KL(teacher || student) at a temperature."""
    log_p, log_q = (teacher / temperature).log_softmax(dim=1), (student / temperature).log_softmax(dim=1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=1)


def reduced(divergence: Tensor, weights: Tensor, reduction: WeightReduction) -> Tensor:
    """Reduces (B,) divergences and weights to one number; ``released`` = B x mean x mean weight."""
    if reduction == "released":
        return divergence.mean() * weights.sum()
    return (divergence * weights).sum() if reduction == "sum" else (divergence * weights).mean()


def feature_loss(student: Outputs, teacher: Outputs) -> Tensor:
    """Returns the mean squared difference of clean bottleneck features, over all elements.

    Raises:
        UserError: the teacher's features are missing or of another width.
    """
    own, given = features_of(student), teacher.features
    if given is None or given.shape != own.shape:
        has = "gives no features" if given is None else f"has {given.shape[1]} features"
        raise UserError(
            f"dart-urda: the teacher {has}, the student's bottleneck has {own.shape[1]}; give --bottleneck of that "
            "width, or switch the term off with --ablate features."
        )
    return F.mse_loss(own, given)
