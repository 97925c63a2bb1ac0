"""The contract of adaptation methods: an objective on labelled source and unlabelled target images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol, cast

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
    """The classifier in training with networks that are used in training only (discriminators, second heads)."""

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
        """Returns float32 outputs in evaluation mode, which an attack differentiates."""
        ...


class BatchTeacher(Teacher, Protocol):
    """A frozen model that may have cached its outputs on the images of the set."""

    def of(self, batch: Batch) -> Outputs:
        """Returns the outputs on the images of a batch as they are in the set, without augmentation."""
        ...


@dataclass(frozen=True)
class Shape:
    """Feature width and number of classes that auxiliary networks must fit."""

    features: int
    classes: int
    copy: Callable[[], nn.Module]
    """A copy of the classifier as training finds it."""


class Pair(NamedTuple):
    """Source and target images of a batch; either may be empty."""

    source: Batch
    target: Batch


class Adaptation(Objective):
    """A method of adaptation or robustification. A subclass is a frozen, keyword-only dataclass.

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
        """True: the loss needs the whole batch, since parts would hold one domain only."""
        return self.domains == "both" or not self.additive

    def auxiliary(self, shape: Shape) -> dict[str, nn.Module]:
        """Returns networks that train beside the classifier and are dropped afterwards."""
        return {}

    @property
    def rates(self) -> dict[str, float]:
        """Returns factors of the learning rate for auxiliary networks, by name."""
        return {}

    @property
    def phases(self) -> tuple[Adaptation, ...]:
        """The stages of the method, each starting from the end of the one before."""
        return (self,)


def student_of(student: Student) -> AdaptedStudent:
    """Returns the student, checked to be one of adaptation."""
    return cast(AdaptedStudent, student)


def teacher_of(teacher: Teacher | None) -> BatchTeacher:
    """Returns the teacher, which an objective with a teacher always has."""
    assert teacher is not None
    return cast(BatchTeacher, teacher)


def domains_of(batch: Batch) -> Pair:
    """Splits a batch into source and target."""
    count = int((batch.labels != UNKNOWN).sum())
    source = Batch(batch.ids[:count], batch.images[:count], batch.labels[:count])
    return Pair(source, Batch(batch.ids[count:], batch.images[count:], batch.labels[count:]))


def features_of(outputs: Outputs) -> Tensor:
    """Returns (B, D) bottleneck features, which a classifier with a head always has."""
    assert outputs.features is not None
    return outputs.features


def split(outputs: Outputs, source: int) -> tuple[Outputs, Outputs]:
    """Splits the outputs of one forward of both domains (so that BatchNorm sees them together) into two."""
    logits, features = outputs.logits, features_of(outputs)
    return Outputs(logits[:source], features[:source]), Outputs(logits[source:], features[source:])


def whole_batch_losses(batch: Batch, **losses: Tensor) -> dict[str, Tensor]:
    """Turns losses of a whole batch into per-image losses: B equal values."""
    return {name: value.expand(len(batch.ids)) for name, value in losses.items()}


def whole_batch_metrics(batch: Batch, **metrics: Tensor | float) -> dict[str, Tensor]:
    """Turns metrics of a whole batch into per-image values."""
    return {
        name: torch.as_tensor(value, dtype=torch.float32, device=batch.images.device).detach().expand(len(batch.ids))
        for name, value in metrics.items()
    }


def __getattr__(name: str) -> Any:
    """Names of version 0.1."""
    from vlmdefend.moved import old_member

    return old_member(__name__, name)
