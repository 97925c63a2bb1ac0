"""The average that makes the pivot and the pull towards it: equations 9 and 10, and their closed forms."""

from __future__ import annotations

import pytest
import torch

from vlmdefend.training.loop.weight_averages import Weights, average_, copied, pull_, put_


def weights(seed: int) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(4, 3, generator=generator), "b": torch.randn(5, generator=generator)}


def test_the_average_after_k_epochs_is_the_geometric_sum() -> None:
    vanilla, decay = weights(0), 0.9
    average, thetas = copied(vanilla), [weights(k) for k in range(1, 6)]
    for theta in thetas:
        average_(average, theta, decay)
    k = len(thetas)
    for name in vanilla:
        expected = decay**k * vanilla[name] + (1 - decay) * sum(
            decay ** (k - 1 - i) * theta[name] for i, theta in enumerate(thetas)
        )
        assert torch.allclose(average[name], expected, atol=1e-6)


@pytest.mark.parametrize(("epochs", "share"), [(5, 0.59049), (10, 0.34868)])
def test_the_weight_of_vanilla_in_the_pivot(epochs: int, share: float) -> None:
    average = {"w": torch.ones(1)}
    for _ in range(epochs):
        average_(average, {"w": torch.zeros(1)}, 0.9)
    assert float(average["w"]) == pytest.approx(share, abs=1e-4)


def test_the_average_of_a_constant_is_that_constant_to_the_bit() -> None:
    vanilla = weights(3)
    average = copied(vanilla)
    for _ in range(10):
        average_(average, vanilla, 0.9)
    assert all(torch.equal(average[name], vanilla[name]) for name in vanilla)


def test_the_pull_shortens_the_way_to_the_pivot_by_its_share() -> None:
    theta, pivot = weights(0), weights(1)
    before = torch.sqrt(sum((theta[n] - pivot[n]).square().sum() for n in theta))
    pull_(theta, pivot, 0.3)
    after = torch.sqrt(sum((theta[n] - pivot[n]).square().sum() for n in theta))
    assert float(after / before) == pytest.approx(0.3, abs=1e-6)


def test_keeping_all_is_no_pull_and_keeping_nothing_is_the_pivot_to_the_bit() -> None:
    theta, pivot = weights(0), weights(1)
    pull_(theta, pivot, 1.0)
    assert all(torch.equal(theta[n], weights(0)[n]) for n in theta)
    pull_(theta, pivot, 0.0)
    assert all(torch.equal(theta[n], pivot[n]) for n in theta)


def test_values_are_put_into_the_model_and_copies_stay_apart() -> None:
    layer = torch.nn.Linear(3, 4)
    kept = copied(dict(layer.named_parameters()))
    put_(dict(layer.named_parameters()), {"weight": torch.ones(4, 3), "bias": torch.zeros(4)})
    assert layer.weight.sum() == 12
    assert not torch.equal(kept["weight"], layer.weight)
