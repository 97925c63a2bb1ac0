"""AOM-like: a step of the embedding from the image past the mean of noisy copies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from vlmdefend.defenses import DEFENSES
from vlmdefend.defenses.base import Defense, Paradigm, Recipe, embedding_pipeline, features_of
from vlmdefend.defenses.views.crops import mean_score, predict_views
from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng
from vlmdefend.types import Amplitude, Outputs, Pipeline


@DEFENSES.register
@dataclass(frozen=True, kw_only=True)
class Aom(Defense):
    """normalize(m + kappa (m - f(x))), m the mean feature of ``copies`` of x with Gaussian noise: our reading.

    Neither the text nor the code of the paper (Tong et al. 2025) could be had; second-hand descriptions say that noise
    is added and that the embedding takes one step away from the adversarial one, guided by noisy anchors. Formula and
    defaults are guesses, so a number obtained here says nothing about the paper's.

    Options:
        sigma: standard deviation of the noise, in pixels of [0, 1].
        copies: noisy copies.
        kappa: how far past their mean; 0 is the mean, -1 the image itself.
    """

    name: ClassVar[str] = "aom"
    paradigm: ClassVar[Paradigm] = "training-free"
    summary: ClassVar[str] = "moves the embedding past the mean of noisy copies (a guess at the method)"
    citation: ClassVar[str] = "after descriptions of Tong et al. 2025, unverified"
    changes: ClassVar[str] = "embedding"
    stochastic: ClassVar[bool] = True
    neutral: ClassVar[dict[str, Any] | None] = {"kappa": -1.0}
    recipe: ClassVar[Recipe] = Recipe("exact; EOT: fresh noise at every step, mean gradient over 4 draws", samples=4)
    sigma: Amplitude = 8 / 255
    copies: int = 4
    kappa: float = 1.0

    def __post_init__(self) -> None:
        if self.copies < 1 or self.sigma < 0:
            raise UserError(f"aom: copies={self.copies} must be at least 1, sigma={self.sigma} zero or more.")

    def wrap(self, model: Pipeline) -> Pipeline:
        """Embeds image and noisy copies, takes the step, compares with the classes."""
        return _Stepped(self, model)

    def step(self, features: Tensor, noisy: Tensor) -> Tensor:
        """Updates (B, D) image features by (B, N, D) noisy ones; returns (B, D) unit features."""
        mean = noisy.mean(dim=1)
        return F.normalize(mean + self.kappa * (mean - features), dim=1)


class _Stepped:
    def __init__(self, defense: Aom, model: Pipeline) -> None:
        self.defense, self.model = defense, embedding_pipeline(model, defense.name)
        self.num_classes, self.stochastic = model.num_classes, True

    def __call__(self, images: Tensor, rng: ImageRng) -> Outputs:
        defense = self.defense
        noise = rng.normal((1 + defense.copies, *images.shape[1:])).to(images.device)
        noise[:, 0] = 0.0
        views = predict_views(self.model, images[:, None] + defense.sigma * noise, rng)
        seen = features_of(views)
        features = defense.step(seen[:, 0], seen[:, 1:])
        return Outputs(self.model.logits(features), features, mean_score(views))
