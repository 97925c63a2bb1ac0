"""The base of the models in training, as the loop sees them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from vlmdefend.training.loop.processes import Processes
from vlmdefend.types import Outputs


class TrainedStudent(ABC):
    """A classifier with the parameters of it that train.

    Args:
        classifier: the model; has ``training_outputs(images)`` and ``batch_norm``.
        parameters: those that train, by name.
        processes: give the precision of the training forward.
    """

    def __init__(self, classifier: Any, parameters: dict[str, nn.Parameter], processes: Processes) -> None:
        self.classifier, self.parameters, self.processes = classifier, parameters, processes
        self.iteration = 0  # steps of this stage taken so far; schedules inside of an objective depend on it
        self.carried: dict[str, Tensor] = {}  # tensors that an objective keeps for its next step, until the epoch ends
        self.rate_factors: dict[str, float] = {}  # factors of the stage's learning rate, by parameter name

    def __call__(self, images: Tensor) -> Outputs:
        """Runs the training forward in training precision; returns float32 outputs."""
        with self.processes.autocast():
            found = self.classifier.training_outputs(images)
        return Outputs(found.logits.float(), None if found.features is None else found.features.float())

    @abstractmethod
    def attacked(self, images: Tensor, classes: Tensor | None = None) -> Tensor:
        """Returns the logits that an attack differentiates: float32 whatever the precision of training."""

    @abstractmethod
    def refresh(self) -> None:
        """Updates what is computed from weights ahead of time, after they changed."""

    @abstractmethod
    def forget(self) -> None:
        """Drops what a forward kept for its backward."""

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """Returns what training changes, by name: parameters, and BatchNorm's running statistics if they train."""
