"""Hedge is its formula, and is attacked where its steps start."""

from __future__ import annotations

import torch

from tests.defenses.linear import SIZE, Linear, rng
from vlmdefend.defenses.training_free.hedge import Hedge


def test_hedge_ends_in_the_corner_that_raises_the_sum_of_cross_entropies(images: torch.Tensor) -> None:
    """Logits (s, -s): the sum is 2 log(2 cosh s), which grows with |s|."""
    row = torch.randn(3 * SIZE * SIZE, generator=torch.Generator().manual_seed(2)).abs()  # s > 0 on every image
    seen = Hedge(eps=0.02, alpha=0.005, steps=20).counter(Linear(torch.stack([row, -row])), images, rng(), "cut").images
    assert torch.allclose(seen, images + 0.02, atol=1e-6)


def test_hedge_is_attacked_where_its_steps_start(images: torch.Tensor, weights: torch.Tensor) -> None:
    model, defense, pixels = Linear(weights, bend=True), Hedge(eps=0.02, steps=3), images.clone().requires_grad_(True)
    surrogate, *_ = defense.surrogates(model)
    (found,) = torch.autograd.grad(surrogate(pixels, rng()).logits[:, 0].sum(), pixels)
    at = 3 * (images + rng().uniform((3, SIZE, SIZE), -0.02, 0.02)).flatten(1)
    assert torch.allclose(found.flatten(1), 3 * (1 - at.tanh() ** 2) * weights[0], atol=1e-5)
    with torch.no_grad():
        assert torch.equal(surrogate(images, rng()).logits, defense.wrap(model)(images, rng()).logits)
