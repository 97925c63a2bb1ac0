"""The objective contract: what one training step minimises, written without a loop, a device or a process in sight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import fields
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


class Teacher(Protocol):
    """A frozen model; what it returns carries no gradient."""

    def __call__(self, images: Tensor) -> Outputs:
        """(B, 3, H, W) in [0, 1], of the student's size -> outputs."""
        ...


class Terms(NamedTuple):
    """What an objective says of B images. A loss of a whole batch is given B times, so that its mean is itself."""

    losses: dict[str, Tensor]  # each (B,), with gradients; minimised is their sum, reduced over the global batch
    metrics: dict[str, Tensor]  # each (B,), without gradients; logged as means


class StepCost(NamedTuple):
    """What one image costs in one step."""

    forward_backwards: int  # of the student's image encoder
    teacher_forwards: int


class Objective(ABC):
    """One objective. A subclass is a frozen, keyword-only dataclass: its fields are its configuration and its repr.

    Class attributes: ``name`` (the file's name), ``summary`` and ``citation`` (one line each, for ``list``), and
    ``teacher``: which frozen model it is given, another one (``proxy``), the student as it was (``original``), or none.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    citation: ClassVar[str]
    teacher: ClassVar[TeacherKind] = "none"

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
