"""Losses that the training attack of the adaptation methods maximises."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmdefend.defenses.training_time._attack import ascend

__all__ = ["ascend", "away_from", "away_from_prediction"]


def away_from(logits: Callable[[Tensor], Tensor], labels: Tensor) -> Callable[[Tensor], Tensor]:
    """Returns the summed cross-entropy of ``labels``."""
    return lambda images: F.cross_entropy(logits(images), labels, reduction="sum")


def away_from_prediction(logits: Callable[[Tensor], Tensor], images: Tensor) -> Callable[[Tensor], Tensor]:
    """Returns the summed KL from the prediction at ``images`` (TRADES, Zhang et al. 2019); needs a random start."""
    with torch.no_grad():
        clean = logits(images).log_softmax(dim=1)
    return lambda moved: F.kl_div(logits(moved).log_softmax(dim=1), clean, reduction="sum", log_target=True)
