"""ET3 is its formula, and unrolled it has the gradient of finite differences."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.defenses.linear import SIZE, Linear, rng
from vlmdefend.defenses.training_free.et3 import Et3
from vlmdefend.rng import ImageRng
from vlmdefend.types import Pipeline


def test_et3_is_one_normalised_step_down_the_energy(images: torch.Tensor, weights: torch.Tensor) -> None:
    gradient = F.normalize(torch.softmax(images.flatten(1) @ weights.T, dim=1) @ weights, dim=1).view_as(images)
    unscaled = Et3(alpha=0.1, steps=1, scaled=False).counter(Linear(weights), images, rng(), "cut").images
    assert torch.allclose(unscaled, images + 0.1 * gradient, atol=1e-6)
    scaled = Et3(alpha=0.1, steps=1).counter(Linear(weights), images, rng(), "cut").images
    assert torch.allclose(scaled, images + 0.1 * SIZE / 224 * gradient, atol=1e-6)


def test_et3_stays_in_its_ball(images: torch.Tensor, weights: torch.Tensor) -> None:
    seen = Et3(alpha=0.1, radius=0.15, steps=5, scaled=False).counter(Linear(weights), images, rng(), "cut").images
    assert torch.allclose((seen - images).flatten(1).norm(dim=1), torch.full((4,), 0.15), atol=1e-5)


def test_unrolled_et3_has_the_gradient_of_finite_differences_and_the_deployed_one_has_not() -> None:
    generator = torch.Generator().manual_seed(3)
    model = Linear(torch.randn(3, 48, generator=generator).double(), bend=True)
    image = (0.3 + 0.4 * torch.rand(1, 3, 4, 4, generator=generator)).double()
    defense = Et3(alpha=0.2, radius=10.0, steps=2, scaled=False)

    def value(pipeline: Pipeline, at: torch.Tensor) -> torch.Tensor:
        return pipeline(at, ImageRng(0, ["a"])).logits[:, 0].sum()

    direction = torch.randn(image.shape, generator=generator).double()
    deployed = defense.wrap(model)
    slope = (value(deployed, image + 1e-5 * direction) - value(deployed, image - 1e-5 * direction)) / 2e-5
    constant, unrolled = (
        (torch.autograd.grad(value(pipeline, pixels), pixels)[0] * direction).sum()
        for pipeline in defense.surrogates(model)
        for pixels in [image.clone().requires_grad_(True)]
    )
    assert torch.allclose(unrolled, slope, rtol=1e-4)
    assert not torch.allclose(constant, slope, rtol=0.05)
