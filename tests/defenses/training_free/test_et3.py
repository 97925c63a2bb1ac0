"""ET3 is its formula; its gradient is in test_unrolled.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.defenses.linear import SIZE, Linear, rng
from vlmdefend.defenses.training_free.et3 import Et3


def test_et3_is_one_normalised_step_down_the_energy(images: torch.Tensor, weights: torch.Tensor) -> None:
    gradient = F.normalize(torch.softmax(images.flatten(1) @ weights.T, dim=1) @ weights, dim=1).view_as(images)
    unscaled = Et3(alpha=0.1, steps=1, scaled=False).counter(Linear(weights), images, rng(), "cut").images
    assert torch.allclose(unscaled, images + 0.1 * gradient, atol=1e-6)
    scaled = Et3(alpha=0.1, steps=1).counter(Linear(weights), images, rng(), "cut").images
    assert torch.allclose(scaled, images + 0.1 * SIZE / 224 * gradient, atol=1e-6)


def test_et3_stays_in_its_ball(images: torch.Tensor, weights: torch.Tensor) -> None:
    seen = Et3(alpha=0.1, radius=0.15, steps=5, scaled=False).counter(Linear(weights), images, rng(), "cut").images
    assert torch.allclose((seen - images).flatten(1).norm(dim=1), torch.full((4,), 0.15), atol=1e-5)
