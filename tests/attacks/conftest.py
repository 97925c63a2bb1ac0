"""Small pipelines with known behaviour."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmdefend.rng import ImageRng
from vlmdefend.types import Outputs


class Wrapped(nn.Module):
    """Any network from pixels to logits as a pipeline; the input of its last layer stands for the features."""

    stochastic = False
    rows: Tensor | None = None  # in place of the last layer's weights, while its "prompts" are others

    def __init__(self, body: nn.Module, head: nn.Linear, shift: float = 0.0) -> None:
        super().__init__()
        self.body, self.head, self.shift = body, head, shift
        self.num_classes = head.out_features

    def forward(self, images: Tensor, rng: ImageRng | None = None) -> Outputs:
        features = self.body(images)
        return Outputs(self.logits(features), features)

    def logits(self, features: Tensor) -> Tensor:
        weight = self.head.weight if self.rows is None else self.rows.to(features.dtype)
        return F.linear(features, weight, self.head.bias) + self.shift


def linear(shape: tuple[int, ...], classes: int, seed: int = 0) -> Wrapped:
    generator = torch.Generator().manual_seed(seed)
    size = int(torch.tensor(shape).prod())
    head = nn.Linear(size, classes)
    with torch.no_grad():
        head.weight.copy_(torch.randn(classes, size, generator=generator))
        head.bias.copy_(torch.randn(classes, generator=generator) * 0.1)
    return Wrapped(nn.Flatten(), head)


def convolutional(classes: int = 5, seed: int = 0) -> Wrapped:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.GELU(),
            nn.Conv2d(8, 8, 3, stride=2, padding=1),
            nn.BatchNorm2d(8),
            nn.GELU(),
            nn.Flatten(),
        )
        head = nn.Linear(8 * 4 * 4, classes)
    model = Wrapped(body, head).eval()
    with torch.no_grad():
        model.head.weight.mul_(10)
    return model


def labelled(model: Wrapped, shape: tuple[int, ...], count: int, seed: int = 1) -> tuple[Tensor, Tensor, list[str]]:
    """Images away from the corners of [0, 1], with the model's own predictions as labels."""
    images = torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed)) * 0.6 + 0.2
    with torch.no_grad():
        labels = model(images).logits.argmax(dim=1)
    return images, labels, [f"image-{i}" for i in range(count)]


@pytest.fixture
def conv() -> Wrapped:
    return convolutional()


class Noisy(Wrapped):
    """Adds a random draw per image to the pixels, and counts its calls."""

    stochastic = True

    def forward(self, images: Tensor, rng: ImageRng | None = None) -> Outputs:
        assert rng is not None
        self.asked = getattr(self, "asked", 0) + len(images)
        return Wrapped.forward(self, images + 0.05 * rng.normal(images.shape[1:]), rng)
