"""The objective contract: what one training step minimises, without loop, device or processes."""

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
    """The model in training as an objective uses it: its training forward and its attacked forward."""

    def __call__(self, images: Tensor) -> Outputs:
        """(B, 3, H, W) in [0, 1] -> float32 outputs that carry gradients to the weights, in training precision."""
        ...

    def attacked(self, images: Tensor) -> Tensor:
        """Returns (B, C) logits of (B, 3, H, W) for an attack: always float32, in evaluation mode."""
        ...

    def attacked_features(self, images: Tensor) -> Tensor:
        """Returns (B, D) features of (B, 3, H, W), not normalised, for an attack on them: as :meth:`attacked`."""
        ...

    def with_patches(self, images: Tensor) -> tuple[Outputs, Tensor]:
        """Returns the outputs, and (B, N, D) features of the N = G x G patches, not normalised."""
        ...

    @property
    def class_features(self) -> Tensor:
        """The (C, D) unit text features, without gradient."""
        ...

    iteration: int
    """Steps of this stage that were taken."""
    carried: dict[str, Tensor]
    """What an objective leaves for its next step, by name: empty when an epoch begins, saved with the run."""


class PromptStudent(Student, Protocol):
    """A student that learns prompts: its class features change, its image features hardly."""

    def attacked(self, images: Tensor, classes: Tensor | None = None) -> Tensor:
        """As that of any student; (C, D) ``classes`` in place of its own class features."""
        ...

    @property
    def hand_features(self) -> Tensor:
        """The (C, D) unit class features of the templates that were written by hand, not learned."""
        ...

    @property
    def context(self) -> Tensor:
        """The learned prompt vectors, (M, W) or (C, M, W) of each class, without gradient."""
        ...

    def classes_of(self, context: Tensor) -> Tensor:
        """Returns (C, D) unit class features of another prompt context, with its gradient."""
        ...

    def answers(self, features: Tensor) -> Tensor:
        """Returns (B, C) logits of (B, D) image features; they carry gradients to the prompts."""
        ...


class Teacher(Protocol):
    """A frozen model; what it returns carries no gradient."""

    def __call__(self, images: Tensor) -> Outputs:
        """(B, 3, H, W) in [0, 1], of the student's size -> outputs."""
        ...


class SpatialTeacher(Teacher, Protocol):
    """A frozen model with features per patch: the student as it was."""

    def with_patches(self, images: Tensor) -> tuple[Outputs, Tensor]:
        """As that of the student."""
        ...


class Terms(NamedTuple):
    """Losses and metrics of B images. A loss of a whole batch is given B times, so that its mean is itself."""

    losses: dict[str, Tensor]  # each (B,), with gradients; minimised is their sum, reduced over the global batch
    metrics: dict[str, Tensor]  # each (B,), without gradients; logged as means


class StepCost(NamedTuple):
    """Forwards and backwards of one image in one training step."""

    forward_backwards: int  # of the student's image encoder
    teacher_forwards: int
    once: int = 0  # forwards and backwards of the student's image encoder before the first step


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The published training schedule of a method; what ``vlmdefend train --profile paper`` takes.

    Args:
        warm_up: steps; None: the published run has another kind, and a tenth of the run takes its place.
        options: of the objective, where the published run differs from its defaults.
        logit_scale: what multiplies the cosines in training; None: the model's own.
        trains: which weights move, as ``--trains`` has it.
        augment: what becomes of each image before a step, as ``--augment`` has it.
        toy_trains: the same, for the embedded toys.
        toy_rate: learning rate for the embedded toys under ``--profile scaled``: batch 64, gradients no longer than 1.
            Ours, found on them.
        toy_optimizer: with it.
        toy_options: of the objective, with it.
    """

    optimizer: Literal["sgd", "adamw"] = "sgd"
    rate: float
    weight_decay: float = 0.0
    batch_size: int
    epochs: int
    warm_up: int | None = 1000
    dataset: str = "tiny-imagenet"
    template: str = "This is a photo of a {c}"
    logit_scale: float | None = None
    trains: str = "image"
    augment: Literal["none", "crop-flip"] = "none"
    toy_trains: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    toy_rate: float = 1e-2
    toy_optimizer: Literal["sgd", "adamw"] = "sgd"
    toy_options: Mapping[str, Any] = field(default_factory=dict)


class Objective(ABC):
    """One objective. A subclass is a frozen, keyword-only dataclass: its fields are its configuration and its repr.

    Class attributes: ``name`` (the file's name), ``summary`` and ``citation`` (one line each, for ``list``), and
    ``teacher``: which frozen model it is given, another one (``proxy``), the student as it was (``original``), or none;
    ``schedule``: how ``vlmdefend train`` trains with it; ``learns``: kinds of ``--trains`` that it is made for, none
    for a method that trains weights.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    citation: ClassVar[str]
    teacher: ClassVar[TeacherKind] = "none"
    schedule: ClassVar[Schedule | None] = None  # None: another command trains with it
    learns: ClassVar[tuple[str, ...]] = ()

    @property
    def whole_batch(self) -> bool:
        """True if the loss of an image depends on the others of its batch, which must then come in one piece."""
        return False

    @property
    def reduction(self) -> Reduction:
        """How per-image losses of the global batch are reduced: ``mean`` or ``sum``."""
        return "mean"

    @abstractmethod
    def losses(self, student: Student, teacher: Teacher | None, batch: Batch, rng: ImageRng) -> Terms:
        """Returns losses and metrics per image.

        Unless ``whole_batch``, a batch may be a part of the global one (gradient accumulation, several processes), and
        no value of an image may depend on the others. ``rng`` holds one stream per image, new in each epoch.
        """

    @property
    def attack(self) -> str:
        """Returns the images that are trained on, in words."""
        return "none"

    @property
    def cost(self) -> StepCost:
        """Returns the passes of one step, for ``--dry-run``."""
        return StepCost(forward_backwards=1, teacher_forwards=int(self.teacher != "none"))

    def spec(self) -> dict[str, Any]:
        """The configuration, as recorded with the result."""
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
