"""Anti-adversary is its formula, and someone who knows it is not misled by its gradient."""

from __future__ import annotations

import pytest
import torch

from tests.defenses.linear import SIZE, Linear, rng
from vlmdefend.defenses.training_free.anti_adversary import AntiAdversary
from vlmdefend.errors import UserError


def test_anti_adversary_steps_towards_the_models_own_prediction(images: torch.Tensor, weights: torch.Tensor) -> None:
    model = Linear(weights)
    said = model(images).logits.argmax(dim=1)
    direction = (weights[said] - weights[1 - said]).sign().view_as(images)  # of -CE for two classes
    model.std = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
    seen = AntiAdversary(steps=2, alpha=0.01).counter(model, images, rng(), "cut").images
    assert torch.allclose(seen, images + 2 * 0.01 * model.std * direction, atol=1e-6)


def test_anti_adversary_may_leave_the_unit_interval_unless_clamped(weights: torch.Tensor) -> None:
    black = torch.zeros(4, 3, SIZE, SIZE)
    assert AntiAdversary().counter(Linear(weights), black, rng(), "cut").images.min() < 0
    assert AntiAdversary(clip=True).counter(Linear(weights), black, rng(), "cut").images.min() == 0


def test_anti_adversary_says_what_to_do_where_the_normalisation_is_unknown(images: torch.Tensor) -> None:
    model = Linear(torch.randn(2, 3 * SIZE * SIZE))
    model.std = None  # type: ignore[assignment]
    with pytest.raises(UserError, match="normalized=False"):
        AntiAdversary().counter(model, images, rng(), "cut")
    AntiAdversary(normalized=False).counter(model, images, rng(), "cut")
