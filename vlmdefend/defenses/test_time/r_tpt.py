"""R-TPT: tunes the prompt on each confident view separately, weights views by their similarity to others."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmdefend.defenses import DEFENSES
from vlmdefend.defenses.base import Recipe
from vlmdefend.defenses.test_time._prompt_tuning import PromptTuning, Sight
from vlmdefend.defenses.views.crops import entropy
from vlmdefend.errors import UserError

MILDER = 5.0  # of 1, 2, 5 and 20 what fooled most images (n = 64), by no more than chance may do


@DEFENSES.register
@dataclass(frozen=True, kw_only=True)
class RTpt(PromptTuning):
    """Robust test-time prompt tuning (Sheng et al. 2025): one AdamW step on the mean entropy of the confident views.

    Prediction: sum_v w_v logits_v over all ``views``, w = softmax(r / ``temperature``), r_v the mean of the
    ``neighbours`` largest cosine similarities of view v's features to other views'. Logits are averaged, not
    probabilities, and the image features are the untuned model's, all as in the official code; but every image starts
    from the untuned prompt, also while it is attacked (the code attacks through the prompt of the image before), views
    are not rounded to 8 bits, and a view is left out of its own neighbours by its place (the code: similarity >= 1).
    Views are random resized crops without AugMix.

    The next draw of views gets other weights; the adaptive attacker takes the gradient of a mean over more views.

    Options:
        neighbours: 20, fewer where there are no 20 other views.
        temperature: of the weights.
    """

    name: ClassVar[str] = "r_tpt"
    summary: ClassVar[str] = "tunes the prompt, weighs crops by how much they resemble others"
    citation: ClassVar[str] = "Sheng et al., CVPR 2025"
    neutral: ClassVar[dict[str, Any] | None] = {"steps": 0, "views": 1}
    recipe: ClassVar[Recipe] = Recipe(
        "tuned prompt constant, or unrolled, best per image, with the gradient of weights at 5 times the temperature; "
        "EOT: fresh views at every step, mean gradient over 2 draws",
        samples=2,
        surrogates=2,
    )
    reads_all_views: ClassVar[bool] = True
    neighbours: int = 20
    temperature: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.neighbours < 1 or not self.temperature > 0:
            raise UserError(
                f"r_tpt: neighbours={self.neighbours} must be at least 1, temperature={self.temperature} more than 0."
            )

    def loss(self, logits: Tensor, classes: Tensor) -> Tensor:
        """Returns the mean entropy of the views."""
        return entropy(logits).mean(dim=1)

    def predict(self, logits: Tensor, features: Tensor, sight: Sight) -> Tensor:
        """Returns the weighted mean over the views; for the adaptive attacker with the gradient of milder weights."""
        exact = (self.weights(features)[:, None] @ logits)[:, 0]
        if sight == "cut" or not exact.requires_grad:
            return exact
        mild = (replace(self, temperature=MILDER * self.temperature).weights(features)[:, None] @ logits)[:, 0]
        return mild + (exact - mild).detach()

    def weights(self, features: Tensor) -> Tensor:
        """Returns (B, V) weights of sum 1 from (B, V, D) features."""
        count = features.shape[1]
        if count == 1:
            return torch.ones_like(features[..., 0])
        units = F.normalize(features, dim=-1)
        alike = (units @ units.mT).masked_fill(torch.eye(count, dtype=torch.bool, device=units.device), -torch.inf)
        nearest = alike.topk(min(self.neighbours, count - 1), dim=-1).values
        return (nearest.mean(dim=-1) / self.temperature).softmax(dim=-1)
