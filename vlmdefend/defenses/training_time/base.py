"""The objective contract: what one training step minimises, written without a loop, a device or a process in sight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

from torch import Tensor

from vlmdefend.rng import ImageRng
from vlmdefend.types import Batch, Outputs

Reduction = Literal["sum", "mean"]
TeacherKind = Literal["none", "proxy", "original"]


class Student(Protocol):
    """The model in training, as an objective sees it: the same weights, twice."""

    def __call__(self, images: Tensor) -> Outputs:
        """(B, 3, H, W) in [0, 1] -> float32 outputs that carry gradients to the weights, in training precision."""
        ...

    def attacked(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C) logits for an attack: always float32, in evaluation mode."""
        ...

    def attacked_features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D) features, not normalised, for an attack on them: as :meth:`attacked`."""
        ...

    def with_patches(self, images: Tensor) -> tuple[Outputs, Tensor]:
        """As a call, and beside it (B, N, D) what the image tower says of each of N = G x G places, not normalised."""
        ...

    @property
    def class_features(self) -> Tensor:
        """(C, D) unit text features, without gradient."""
        ...


class Teacher(Protocol):
    """A frozen model; what it returns carries no gradient."""

    def __call__(self, images: Tensor) -> Outputs:
        """(B, 3, H, W) in [0, 1], of the student's size -> outputs."""
        ...


class SpatialTeacher(Teacher, Protocol):
    """A frozen model that also says what it sees where: the student as it was."""

    def with_patches(self, images: Tensor) -> tuple[Outputs, Tensor]:
        """As that of the student."""
        ...


class Terms(NamedTuple):
    """What an objective says of B images. A loss of a whole batch is given B times, so that its mean is itself."""

    losses: dict[str, Tensor]  # each (B,), with gradients; minimised is their sum, reduced over the global batch
    metrics: dict[str, Tensor]  # each (B,), without gradients; logged as means


class StepCost(NamedTuple):
    """What one image costs in one step."""

    forward_backwards: int  # of the student's image encoder
    teacher_forwards: int


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How a method's authors train with it; what ``vlmdefend train --profile paper`` takes.

    Args:
        options: of the objective, where the published run differs from its defaults.
        logit_scale: what multiplies the cosines in training; None: the model's own.
        toy_rate: learning rate for the embedded toys under ``--profile scaled``: SGD, batch 64, gradients no longer
            than 1. Ours, found on them.
        toy_options: of the objective, with it.
    """

    optimizer: Literal["sgd", "adamw"] = "sgd"
    rate: float
    weight_decay: float = 0.0
    batch_size: int
    epochs: int
    warm_up: int = 1000
    dataset: str = "tiny-imagenet"
    template: str = "This is a photo of a {c}"
    logit_scale: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    toy_rate: float = 1e-2
    toy_options: Mapping[str, Any] = field(default_factory=dict)


class Objective(ABC):
    """One objective. A subclass is a frozen, keyword-only dataclass: its fields are its configuration and its repr.

    Class attributes: ``name`` (the file's name), ``summary`` and ``citation`` (one line each, for ``list``), and
    ``teacher``: which frozen model it is given, another one (``proxy``), the student as it was (``original``), or none;
    ``schedule``: how ``vlmdefend train`` trains with it.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    citation: ClassVar[str]
    teacher: ClassVar[TeacherKind] = "none"
    schedule: ClassVar[Schedule | None] = None  # None: another command trains with it

    @property
    def reduction(self) -> Reduction:
        """How the loop makes one number of the global batch."""
        return "mean"

    @abstractmethod
    def losses(self, student: Student, teacher: Teacher | None, batch: Batch, rng: ImageRng) -> Terms:
        """Losses and metrics per image.

        A batch may be a part of the global one (gradient accumulation, several processes): no value of an image may
        depend on the others. ``rng`` holds one stream per image, new in each epoch.
        """

    @property
    def cost(self) -> StepCost:
        """For ``--dry-run``."""
        return StepCost(forward_backwards=1, teacher_forwards=int(self.teacher != "none"))

    def spec(self) -> dict[str, Any]:
        """The configuration, as recorded with the result."""
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
