"""A CLIP in training: the forward that is trained and the one that is attacked; and the frozen teacher beside it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlmdefend.errors import UserError
from vlmdefend.training.clip.adapters import dropped_out
from vlmdefend.training.clip.classifier import TrainedClassifier, batch_norm_buffers
from vlmdefend.training.loop.processes import Processes
from vlmdefend.training.loop.student import TrainedStudent
from vlmdefend.types import Outputs


class ClipStudent(TrainedStudent):
    """A CLIP in training; satisfies :class:`~vlmdefend.defenses.training_time.base.Student`.

    Args:
        classifier: the model.
        parameters: those of it that train, by name.
        processes: give the precision of the training forward.
    """

    classifier: TrainedClassifier

    def __init__(self, classifier: TrainedClassifier, parameters: dict[str, nn.Parameter], processes: Processes):
        super().__init__(classifier, parameters, processes)

    def __call__(self, images: Tensor) -> Outputs:
        """The forward that is trained, in training precision; outputs in float32."""
        with self.processes.autocast(), dropped_out(self.classifier, self.iteration):
            found = self.classifier.training_outputs(images)
        return Outputs(found.logits.float(), None if found.features is None else found.features.float())

    def attacked(self, images: Tensor, classes: Tensor | None = None) -> Tensor:
        """The logits that an attack differentiates: float32 whatever the precision of training.

        Args:
            classes: (C, D) unit class features in place of the model's own.
        """
        return self.classifier.logits(self.classifier.features(images), classes)

    def attacked_features(self, images: Tensor) -> Tensor:
        """(B, D) features that an attack differentiates: as :meth:`attacked`."""
        return self.classifier.features(images)

    def with_patches(self, images: Tensor) -> tuple[Outputs, Tensor]:
        """The forward that is trained, with (B, N, D) what it says of each place; in float32."""
        with self.processes.autocast(), dropped_out(self.classifier, self.iteration):
            found, patches = self.classifier.with_patches(images)
        return Outputs(
            found.logits.float(), None if found.features is None else found.features.float()
        ), patches.float()

    @property
    def class_features(self) -> Tensor:
        """(C, D) unit text features, without gradient."""
        return self.classifier.text_features

    @property
    def hand_features(self) -> Tensor:
        """(C, D) unit text features of the run's templates, where a context is learned in their place."""
        return self.classifier.hand_features

    @property
    def context(self) -> Tensor:
        """(M, W), or (C, M, W), the context that is learned, detached."""
        context = self.classifier.model.context
        if context is None:
            raise UserError("this model has no learned context; train one with --trains context:M.")
        return context.detach()

    def classes_of(self, context: Tensor) -> Tensor:
        """(C, D) unit class features of another context, with its gradient; in float32."""
        return self.classifier.classes_of(context)

    def answers(self, features: Tensor) -> Tensor:
        """(B, D) image features -> (B, C) logits that carry gradients to what trains of the text side."""
        return self.classifier.logits(features, self.classifier.class_features())

    def refresh(self) -> None:
        """Bring up to date what is computed from weights that were just changed."""
        self.classifier.refresh()

    def forget(self) -> None:
        """Drop what a forward kept for its backward."""
        self.classifier.forget()

    def weights(self) -> dict[str, Tensor]:
        """What training changes, by name: parameters, and BatchNorm's running statistics where they train."""
        found: dict[str, Tensor] = {name: p.detach() for name, p in self.parameters.items()}
        if self.classifier.batch_norm == "train":
            found |= batch_norm_buffers(self.classifier.clip)
        return found


class AutocastTeacher:
    """A frozen model in the precision of the training forward."""

    def __init__(self, classifier: TrainedClassifier, processes: Processes) -> None:
        self.classifier, self.processes = classifier, processes

    def __call__(self, images: Tensor) -> Outputs:
        """Without gradient, in float32 outside."""
        with torch.no_grad(), self.processes.autocast():
            found = self.classifier(images)
        return Outputs(found.logits.float(), None if found.features is None else found.features.float())

    def with_patches(self, images: Tensor) -> tuple[Outputs, Tensor]:
        """The same, with (B, N, D) what the model says of each place."""
        with torch.no_grad(), self.processes.autocast():
            found, patches = self.classifier.with_patches(images)
        return Outputs(
            found.logits.float(), None if found.features is None else found.features.float()
        ), patches.float()
