"""Averages of weights by name: the moving average that gives the pivot, and the pull towards it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def copied(weights: Mapping[str, Tensor]) -> Weights:
    """Returns copies of the values, apart from the model."""
    return {name: tensor.detach().clone() for name, tensor in weights.items()}


def weights_hash(weights: Mapping[str, Tensor]) -> str:
    """Returns 16 hex digits over names and bits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def put_(into: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Overwrites a model's weights."""
    for name, tensor in into.items():
        tensor.copy_(values[name])


@torch.no_grad()
def average_(average: Weights, weights: Mapping[str, Tensor], decay: float) -> None:
    """``average <- decay average + (1 - decay) weights`` (Fu et al. 2026, eq. 9), as a step along the difference.

    So the average of a constant is that constant to the last bit.
    """
    for name, tensor in average.items():
        tensor.lerp_(weights[name], 1.0 - decay)


@torch.no_grad()
def pull_(weights: Mapping[str, Tensor], pivot: Mapping[str, Tensor], kept: float) -> None:
    """``weights <- kept weights + (1 - kept) pivot`` (Fu et al. 2026, eq. 10); 1 changes nothing, 0 is the pivot."""
    for name, tensor in weights.items():
        tensor.lerp_(pivot[name].to(tensor.device), 1.0 - kept)
