"""Linear models whose defenses can be computed by hand, for four images of four pixels a side (see conftest.py)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmdefend.rng import ImageRng
from vlmdefend.types import Outputs

SIZE = 4


def rng() -> ImageRng:
    """Fresh streams of the four images."""
    return ImageRng(0, list("abcd"))


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


class Embedding:
    """Features are the pixels times fixed weights, logits 10 cosines to three class texts."""

    stochastic, num_classes = False, 3

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weights = torch.randn(6, 3 * SIZE * SIZE, generator=generator)
        self.text_features = F.normalize(torch.randn(3, 6, generator=generator), dim=1)

    def logits(self, features: Tensor) -> Tensor:
        """(..., 6) of any length -> (..., 3)."""
        return 10 * F.normalize(features, dim=-1) @ self.text_features.T

    def __call__(self, images: Tensor, rng: ImageRng) -> Outputs:
        features = images.flatten(1) @ self.weights.T
        return Outputs(self.logits(features), features)
