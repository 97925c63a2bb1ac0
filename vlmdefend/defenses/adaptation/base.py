"""The adaptation contract: an objective on labelled source and unlabelled target images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from vlmdefend.defenses.training_time.base import Objective, Student, Teacher
from vlmdefend.types import Batch, Outputs

if TYPE_CHECKING:
    from vlmdefend.models.classifier.classifier import ImageClassifier

UNKNOWN = -1  # the label of a target image: the true one never reaches an objective
Domains = Literal["both", "source", "target"]
Role = Literal["adaptation", "robustification"]


class AdaptedStudent(Student, Protocol):
    """The classifier in training with the networks that exist for training only (discriminators, second heads)."""

    iteration: int
    """Steps of this stage that were taken: what a schedule inside an objective depends on."""
    steps: int
    """Steps of this stage in all."""
    classifier: ImageClassifier
    auxiliary: Mapping[str, nn.Module]

    def __call__(self, images: Tensor) -> Outputs:
        """(B, 3, H, W) in [0, 1] -> outputs with gradients to the weights; BatchNorm with its batch's statistics."""
        ...

    def evaluated(self, images: Tensor) -> Outputs:
        """The same in evaluation mode, float32: what an attack differentiates."""
        ...


class BatchTeacher(Teacher, Protocol):
    """A frozen model that knows the images of the set: it may have looked at them before."""

    def of(self, batch: Batch) -> Outputs:
        """Outputs at the images of a batch as they lie in the set, not augmented."""
        ...


@dataclass(frozen=True)
class Shape:
    """What the networks beside the classifier must fit."""

    features: int
    classes: int
    copy: Callable[[], nn.Module]
    """A copy of the classifier as training finds it."""


class Pair(NamedTuple):
    """The two domains of a batch; either may be empty."""

    source: Batch
    target: Batch


class Adaptation(Objective):
    """A way to adapt, or to make robust under adaptation. A subclass is a frozen, keyword-only dataclass.

    Class attributes beside an objective's: ``role`` (``adaptation``: makes a teacher; ``robustification``: what step 2
    may be), ``domains`` (whose images a batch holds), ``trains`` (False: the backbone is used as it is), ``additive``
    (True: each loss is a mean over images of a domain, so that processes with equal shares of both add up to one).

    A batch holds source images, then target images whose label is :data:`UNKNOWN`.
    """

    role: ClassVar[Role]
    domains: ClassVar[Domains] = "both"
    trains: ClassVar[bool] = True
    additive: ClassVar[bool] = False

    @property
    def whole_batch(self) -> bool:
        """A part of a batch would be of one domain only, and some losses compare its images."""
        return self.domains == "both" or not self.additive

    def auxiliary(self, shape: Shape) -> dict[str, nn.Module]:
        """Networks that train beside the classifier and are left behind."""
        return {}

    @property
    def rates(self) -> dict[str, float]:
        """Of networks beside the classifier that learn at another rate than the stage's: its factor."""
        return {}

    @property
    def phases(self) -> tuple[Adaptation, ...]:
        """The stages, each from where the one before ended."""
        return (self,)


def student_of(student: Student) -> AdaptedStudent:
    """The student as these objectives need it."""
    return cast(AdaptedStudent, student)


def teacher_of(teacher: Teacher | None) -> BatchTeacher:
    """The teacher; an objective that says it has one is given one."""
    assert teacher is not None
    return cast(BatchTeacher, teacher)


def domains_of(batch: Batch) -> Pair:
    """A batch as source and target."""
    count = int((batch.labels != UNKNOWN).sum())
    source = Batch(batch.ids[:count], batch.images[:count], batch.labels[:count])
    return Pair(source, Batch(batch.ids[count:], batch.images[count:], batch.labels[count:]))


def features_of(outputs: Outputs) -> Tensor:
    """(B, D) bottleneck features; a classifier with a head always has them."""
    assert outputs.features is not None
    return outputs.features


def split(outputs: Outputs, source: int) -> tuple[Outputs, Outputs]:
    """The outputs of one forward of both domains, so that BatchNorm sees them together, as two."""
    logits, features = outputs.logits, features_of(outputs)
    return Outputs(logits[:source], features[:source]), Outputs(logits[source:], features[source:])


def whole(batch: Batch, **losses: Tensor) -> dict[str, Tensor]:
    """Losses of a whole batch in the form of losses per image: the mean of B equal values."""
    return {name: value.expand(len(batch.ids)) for name, value in losses.items()}


def told(batch: Batch, **metrics: Tensor | float) -> dict[str, Tensor]:
    """Metrics of a whole batch, likewise."""
    return {
        name: torch.as_tensor(value, dtype=torch.float32, device=batch.images.device).detach().expand(len(batch.ids))
        for name, value in metrics.items()
    }
