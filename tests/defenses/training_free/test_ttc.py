"""TTC is its formula, decides image by image, and costs what it says."""

from __future__ import annotations

import pytest
import torch

from tests.defenses.linear import SIZE, Linear, rng
from vlmdefend.defenses.training_free.ttc import Ttc
from vlmdefend.evaluation.cell.query_count import CountingModel


@pytest.mark.parametrize("threshold", [0.0, torch.inf])
def test_ttc_weighs_its_steps_where_tau_is_low_and_adds_noise_only_elsewhere(
    images: torch.Tensor, weights: torch.Tensor, threshold: float
) -> None:
    """Features are pixels, so the ascent on |delta|^2 steps along sign(delta_0)."""
    eps, alpha = 4 / 255, 1 / 255
    start = rng().uniform((3, SIZE, SIZE), -eps, eps)
    first = (start + alpha * start.sign()).clamp(-eps, eps)
    second = (first + alpha * start.sign()).clamp(-eps, eps)
    e = torch.e
    countered = (start + e**2 * first + e**4 * second) / (1 + e**2 + e**4)
    found = Ttc(threshold=threshold).counter(Linear(weights), images, rng(), "cut")
    assert torch.allclose(found.images - images, countered if threshold else start, atol=1e-6)
    tau = start.flatten(1).norm(dim=1) / images.flatten(1).norm(dim=1)
    if not threshold:
        assert found.detector_score is not None
        assert torch.allclose(found.detector_score, -tau, atol=1e-5)


def test_ttc_decides_image_by_image(images: torch.Tensor, weights: torch.Tensor) -> None:
    noise = rng().uniform((3, SIZE, SIZE), -4 / 255, 4 / 255).flatten(1).norm(dim=1)
    tau = noise / images.flatten(1).norm(dim=1)
    middle = tau.sort().values[1:3].mean().item()
    seen = Ttc(threshold=middle).counter(Linear(weights), images, rng(), "cut").images
    only_noise = Ttc(threshold=0.0).counter(Linear(weights), images, rng(), "cut").images
    same = [torch.allclose(a, b) for a, b in zip(seen, only_noise, strict=True)]
    assert same == (tau >= middle).tolist()
    assert sum(same) == 2


def test_ttc_costs_two_gradients_and_two_forwards(images: torch.Tensor, weights: torch.Tensor) -> None:
    model = CountingModel(Linear(weights))
    with torch.no_grad():
        Ttc().wrap(model)(images, rng())
    assert (model.forwards, model.backwards) == (4 * 4, 2 * 4)
