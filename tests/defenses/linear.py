"""A linear model whose counter-attacks can be computed by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmdefend.rng import ImageRng
from vlmdefend.types import Outputs


class Linear:
    """Features are the pixels themselves, logits ``pixels @ weights.T + bias``; optionally bent by tanh."""

    stochastic = False
    std = torch.ones(3, 1, 1)

    def __init__(self, weights: Tensor, *, bend: bool = False) -> None:
        self.weights, self.bend = weights, bend
        self.num_classes = len(weights)

    def __call__(self, images: Tensor, rng: ImageRng | None = None) -> Outputs:
        features = images.flatten(1)
        features = torch.tanh(3 * features) if self.bend else features
        return Outputs(features @ self.weights.T, features)
