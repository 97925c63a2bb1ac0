"""The classifier in training with its auxiliary networks, as loop and adaptation objectives use them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlmdefend.defenses.adaptation.base import Adaptation, Shape
from vlmdefend.models.classifier.classifier import ImageClassifier
from vlmdefend.training.loop.processes import Processes
from vlmdefend.training.loop.student import TrainedStudent
from vlmdefend.types import Outputs


class AdaptedStudent(TrainedStudent):
    """A classifier in training; satisfies :class:`~vlmdefend.defenses.adaptation.base.AdaptedStudent`.

    Args:
        classifier: what trains, on its device.
        methods: the stages' objectives, whose networks train beside it.
        processes: give the precision of the training forward.
        backbone_factor: of the learning rate, for the backbone's parameters.
        steps: of the stage.
        seed: of the weights of the networks beside it; the global random state is left as it was.
    """

    classifier: Any  # an ImageClassifier, where the base has a zero-shot one

    def __init__(
        self,
        classifier: ImageClassifier,
        methods: tuple[Adaptation, ...],
        processes: Processes,
        *,
        backbone_factor: float = 1.0,
        steps: int = 10_000,
        seed: int = 0,
    ) -> None:
        shape = Shape(classifier.width, classifier.num_classes, lambda: copy_of(classifier))
        made: dict[str, nn.Module] = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for method in methods:
                made |= method.auxiliary(shape)
        self.auxiliary = {name: network.to(processes.device).eval() for name, network in made.items()}
        classifier.requires_grad_(True)
        own = {f"classifier.{name}": p for name, p in classifier.named_parameters()}
        beside = {
            f"{name}.{part}": p.requires_grad_(True)
            for name, network in self.auxiliary.items()
            for part, p in network.named_parameters()
        }
        super().__init__(classifier, own | beside, processes)  # type: ignore[arg-type]
        self.steps = steps
        self.rate_factors = {name: backbone_factor for name in own if name.startswith("classifier.backbone.")}
        for network, factor in (pair for method in methods for pair in method.rates.items()):
            self.rate_factors |= {name: factor for name in beside if name.startswith(f"{network}.")}

    def attacked(self, images: Tensor, classes: Tensor | None = None) -> Tensor:
        """Returns (B, C) float32 logits of (B, 3, S, S) images in evaluation mode."""
        return self.evaluated(images).logits

    def evaluated(self, images: Tensor) -> Outputs:
        """Returns float32 outputs of (B, 3, S, S) images in evaluation mode."""
        found: Outputs = self.classifier(images)
        return found

    def refresh(self) -> None:
        """Does nothing: no value is computed from weights ahead of time."""

    def forget(self) -> None:
        """Does nothing: a forward keeps nothing."""

    def weights(self) -> dict[str, Tensor]:
        """Returns parameters, and BatchNorm's running statistics if they train."""
        found: dict[str, Tensor] = {name: p.detach() for name, p in self.parameters.items()}
        if self.classifier.batch_norm == "train":
            found |= {f"classifier.{n}": b for n, b in self.classifier.running_statistics().items()}
        return found


def copy_of(classifier: ImageClassifier) -> ImageClassifier:
    """Returns an independent, frozen copy."""
    from copy import deepcopy

    return deepcopy(classifier).requires_grad_(False)
