"""Noise: adds a fresh Gaussian draw to the image at every call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from vlmdefend.defenses import DEFENSES
from vlmdefend.defenses.base import Defense, Paradigm, Recipe, TransformedInput
from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng
from vlmdefend.types import Amplitude, Pipeline


@DEFENSES.register
@dataclass(frozen=True, kw_only=True)
class Noise(Defense):
    """One prediction on x + sigma n, n standard normal, not clamped (a control in most training-free papers).

    A single draw makes each gradient noisy; the adaptive attacker averages over 20 (EOT). At ``sigma`` in {4, 8}/255,
    as in the literature, 224-pixel images hardly change; the default is larger.

    Options:
        sigma: standard deviation in pixel units.
    """

    name: ClassVar[str] = "noise"
    paradigm: ClassVar[Paradigm] = "training-free"
    summary: ClassVar[str] = "Gaussian noise on the input, one draw per prediction"
    citation: ClassVar[str] = "Cohen et al. 2019 (without the vote)"
    stochastic: ClassVar[bool] = True
    neutral: ClassVar[dict[str, Any] | None] = {"sigma": 0.0}
    recipe: ClassVar[Recipe] = Recipe("EOT: mean gradient over 20 draws", samples=20)
    sigma: Amplitude = 16 / 255

    def __post_init__(self) -> None:
        if self.sigma < 0:
            raise UserError(f"noise: sigma={self.sigma} must be zero or more.")

    def wrap(self, model: Pipeline) -> Pipeline:
        """Adds noise, then predicts."""
        return TransformedInput(model, self.add_noise, stochastic=True)

    def add_noise(self, images: Tensor, rng: ImageRng) -> Tensor:
        """Adds a fresh noise draw per image to (B, 3, H, W)."""
        return images + self.sigma * rng.normal(images.shape[1:]).to(images.device)
