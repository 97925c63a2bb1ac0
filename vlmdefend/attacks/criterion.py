"""The criterion of an attack: leave the label, or reach a target class."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmdefend.types import Outputs

# An image leaves when it is fooled by more than what another batch's float rounding could take back.
SURE = 1e-3


def best_other(logits: Tensor, classes: Tensor) -> Tensor:
    """Returns the (B,) highest logit outside ``classes`` (B,). Masks with -inf: a product mask fails on negative
    logits.
    """
    return logits.scatter(1, classes[:, None], -torch.inf).amax(dim=1)


@dataclass(frozen=True)
class Criterion:
    """Labels to leave or targets to reach; ``reference`` holds the clean outputs for label-free losses."""

    labels: Tensor  # (B,) int64
    targets: Tensor | None = None  # (B,) int64
    reference: Outputs | None = None

    def select(self, index: Tensor) -> Criterion:
        """Returns the criterion for some of the images."""
        at = index.to(self.labels.device)
        reference = self.reference
        if reference is not None:
            features = None if reference.features is None else reference.features[at]
            reference = Outputs(reference.logits[at], features)
        return Criterion(self.labels[at], None if self.targets is None else self.targets[at], reference)

    def margin(self, logits: Tensor) -> Tensor:
        """Returns the (B,) margin past the criterion: best other minus label logit, or target minus best other."""
        if self.targets is None:
            return best_other(logits, self.labels) - logits.gather(1, self.labels[:, None])[:, 0]
        return logits.gather(1, self.targets[:, None])[:, 0] - best_other(logits, self.targets)

    def reached(self, logits: Tensor) -> Tensor:
        """Returns (B,) bool: whether the prediction (argmax, ties to the lowest index) meets the criterion."""
        predictions = logits.argmax(dim=1)
        return predictions != self.labels if self.targets is None else predictions == self.targets
