"""A CLIP in training, with its training forward and its attacked forward, and the frozen teacher."""

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
        parameters: those that train, by name.
        processes: give the precision of the training forward.
    """

    classifier: TrainedClassifier

    def __init__(self, classifier: TrainedClassifier, parameters: dict[str, nn.Parameter], processes: Processes):
        super().__init__(classifier, parameters, processes)

    def __call__(self, images: Tensor) -> Outputs:
        """Runs the training forward in training precision, with LoRA's dropout; returns float32 outputs."""
        with self.processes.autocast(), dropped_out(self.classifier, self.iteration):
            found = self.classifier.training_outputs(images)
        return Outputs(found.logits.float(), None if found.features is None else found.features.float())

    def attacked(self, images: Tensor, classes: Tensor | None = None) -> Tensor:
        """Returns the logits that an attack differentiates: float32 whatever the precision of training.

        Args:
            classes: (C, D) unit class features in place of the model's own.
        """
        return self.classifier.logits(self.classifier.features(images), classes)

    def attacked_features(self, images: Tensor) -> Tensor:
        """Returns the (B, D) features that an attack differentiates, in float32 as :meth:`attacked`."""
        return self.classifier.features(images)

    def with_patches(self, images: Tensor) -> tuple[Outputs, Tensor]:
        """Runs the training forward; returns its outputs and the (B, N, D) features of the N patches, in float32."""
        with self.processes.autocast(), dropped_out(self.classifier, self.iteration):
            found, patches = self.classifier.with_patches(images)
        return Outputs(
            found.logits.float(), None if found.features is None else found.features.float()
        ), patches.float()

    @property
    def class_features(self) -> Tensor:
        """The (C, D) unit text features, without gradient."""
        return self.classifier.text_features

    @property
    def hand_features(self) -> Tensor:
        """The (C, D) unit text features of the run's templates, where a context is learned in their place."""
        return self.classifier.hand_features

    @property
    def context(self) -> Tensor:
        """The learned context, (M, W) or (C, M, W), detached.

        Raises:
            UserError: the model has none.
        """
        context = self.classifier.model.context
        if context is None:
            raise UserError("this model has no learned context; train one with --trains context:M.")
        return context.detach()

    def classes_of(self, context: Tensor) -> Tensor:
        """Returns (C, D) unit class features of another context, with gradients to it, in float32."""
        return self.classifier.classes_of(context)

    def answers(self, features: Tensor) -> Tensor:
        """Returns (B, C) logits of (B, D) image features, with gradients to the trained parameters of the text side."""
        return self.classifier.logits(features, self.classifier.class_features())

    def refresh(self) -> None:
        """Updates the cached text features after the weights changed."""
        self.classifier.refresh()

    def forget(self) -> None:
        """Drops the text features that a forward cached with their graph."""
        self.classifier.forget()

    def weights(self) -> dict[str, Tensor]:
        """Returns the tensors that training changes, by name: parameters, and BatchNorm statistics if they train."""
        found: dict[str, Tensor] = {name: p.detach() for name, p in self.parameters.items()}
        if self.classifier.batch_norm == "train":
            found |= batch_norm_buffers(self.classifier.clip)
        return found


class AutocastTeacher:
    """A frozen teacher that runs in the precision of the training forward, without gradients."""

    def __init__(self, classifier: TrainedClassifier, processes: Processes) -> None:
        self.classifier, self.processes = classifier, processes

    def __call__(self, images: Tensor) -> Outputs:
        """Returns float32 outputs of a batch of images."""
        with torch.no_grad(), self.processes.autocast():
            found = self.classifier(images)
        return Outputs(found.logits.float(), None if found.features is None else found.features.float())

    def with_patches(self, images: Tensor) -> tuple[Outputs, Tensor]:
        """Returns float32 outputs and the (B, N, D) features of the N patches."""
        with torch.no_grad(), self.processes.autocast():
            found, patches = self.classifier.with_patches(images)
        return Outputs(
            found.logits.float(), None if found.features is None else found.features.float()
        ), patches.float()
