"""Total variation denoising of the image before the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlmdefend.defenses import DEFENSES
from vlmdefend.defenses.base import Defense, Paradigm, Recipe, TransformedInput
from vlmdefend.errors import UserError
from vlmdefend.types import Pipeline


@DEFENSES.register
@dataclass(frozen=True, kw_only=True)
class TotalVariation(Defense):
    """u = argmin 1/2 ||u - x||^2 + weight TV(u), TV isotropic, per channel (Rudin, Osher, Fatemi 1992).

    Solved by gradient projection on the dual (Chambolle 2005): from p = 0, at every pixel,
    p <- (p + grad(u) / (8 weight)) / max(1, |same|), where u = x + weight div p; 8 is the largest that the norm of
    div grad can be. The iterations are unrolled, so plain white-box gradients are exact.

    Guo et al. (2018) minimise over a random half of the pixels with another solver (weight 0.03 in its units); papers
    on CLIP that list total variation do not give their variant. This is the deterministic core. A region of the image
    loses weight x boundary / area (in pixels) of its contrast, so at the same weight small images lose more.

    Options:
        weight: of the smoothness, for pixels in [0, 1]; 0 does nothing.
        iterations: of the projection; the image is near its minimum after some tens at the default weight.
    """

    name: ClassVar[str] = "total_variation"
    paradigm: ClassVar[Paradigm] = "training-free"
    summary: ClassVar[str] = "total variation denoising of the input"
    citation: ClassVar[str] = "Rudin et al. 1992; Chambolle 2005; Guo et al. 2018"
    neutral: ClassVar[dict[str, Any] | None] = {"weight": 0.0}
    recipe: ClassVar[Recipe] = Recipe("exact: all iterations are unrolled")
    weight: float = 0.05
    iterations: int = 30

    def __post_init__(self) -> None:
        if self.weight < 0 or self.iterations < 1:
            raise UserError(
                f"total_variation: weight={self.weight} must be zero or more, iterations={self.iterations} at least 1."
            )

    def wrap(self, model: Pipeline) -> Pipeline:
        """Denoises, then predicts."""
        return TransformedInput(model, lambda images, rng: self.denoise(images))

    def denoise(self, images: Tensor) -> Tensor:
        """Denoises (B, 3, H, W) images; the mean of each channel is kept."""
        if self.weight == 0:
            return images
        down = torch.zeros_like(images)  # p, at the edge between a pixel and the next one; zero at the last
        across = torch.zeros_like(images)
        step = 1 / (8 * self.weight)
        for _ in range(self.iterations):
            smooth = images + self.weight * _divergence(down, across)
            down = down + step * _difference(smooth, -2)
            across = across + step * _difference(smooth, -1)
            # the square is clamped before the root, whose slope at zero is infinite
            length = (down.square() + across.square()).clamp_min(1.0).sqrt()
            down, across = down / length, across / length
        return images + self.weight * _divergence(down, across)


def _difference(images: Tensor, dim: int) -> Tensor:
    """The next pixel minus this one; zero at the last."""
    return torch.diff(images, dim=dim, append=images.narrow(dim, images.shape[dim] - 1, 1))


def _divergence(down: Tensor, across: Tensor) -> Tensor:
    """Minus the adjoint of the differences; the last entries of ``down`` and ``across`` are zero."""
    return _backward(down, -2) + _backward(across, -1)


def _backward(flow: Tensor, dim: int) -> Tensor:
    return torch.diff(flow, dim=dim, prepend=torch.zeros_like(flow.narrow(dim, 0, 1)))
