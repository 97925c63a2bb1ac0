"""The attack inside every objective climbs what the objective minimises: an inverted one would train nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlmdefend.defenses.training_time import OBJECTIVES
from vlmdefend.rng import ImageRng
from vlmdefend.types import Batch, Outputs

# Held by tests of their own, which know the prompts and classes that these methods need.
ELSEWHERE = {"adv-lora", "advpt", "apt"}
ATTACKED = [cls.name for cls in OBJECTIVES if cls.name not in ELSEWHERE]


class Smooth:
    """Four places of a 4 x 4 image, each embedded by the same map; the image is their mean. Differentiable."""

    def __init__(self, seed: int) -> None:
        drawn = torch.Generator().manual_seed(seed)
        self.map = torch.randn(12, 6, generator=drawn)
        self.class_features = F.normalize(torch.randn(3, 6, generator=drawn), dim=1)

    def with_patches(self, images: Tensor) -> tuple[Outputs, Tensor]:
        places = F.unfold(images, kernel_size=2, stride=2).mT @ self.map  # (B, 4, 6)
        features = places.mean(dim=1)
        return Outputs(10 * F.normalize(features, dim=1) @ self.class_features.T, features), places

    def __call__(self, images: Tensor) -> Outputs:
        return self.with_patches(images)[0]

    def attacked(self, images: Tensor) -> Tensor:
        return self(images).logits

    def attacked_features(self, images: Tensor) -> Tensor:
        features = self(images).features
        assert features is not None
        return features


@pytest.mark.parametrize("name", ATTACKED)
def test_the_losses_rise_with_the_steps_of_the_attack(name: str) -> None:
    drawn = torch.Generator().manual_seed(1)
    ids = [str(i) for i in range(16)]
    batch = Batch(ids, torch.rand(16, 3, 4, 4, generator=drawn), torch.randint(3, (16,), generator=drawn))
    student, teacher = Smooth(2), Smooth(3)

    def total(steps: int) -> float:
        options = {"images": "adversarial"} if name == "at" else {}
        objective = OBJECTIVES.create(name, eps=16 / 255, alpha=4 / 255, steps=steps, **options)
        found = objective.losses(student, teacher, batch, ImageRng(0, ids, "test"))
        return float(sum(loss.sum() for loss in found.losses.values()))

    start, middle, end = (total(steps) for steps in (0, 2, 8))
    assert start < middle < end
