"""TPT: tunes the prompt to minimise the entropy of the confident views' mean prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from vlmdefend.defenses import DEFENSES
from vlmdefend.defenses.base import Recipe
from vlmdefend.defenses.test_time._prompt_tuning import PromptTuning, Sight
from vlmdefend.defenses.views.crops import marginal_entropy


@DEFENSES.register
@dataclass(frozen=True, kw_only=True)
class Tpt(PromptTuning):
    """Test-time prompt tuning (Shu et al. 2022, equation 4): one AdamW step on H(mean_v p_v), predict the image itself.

    p_v are the probabilities of the ``keep`` most confident of ``views`` views. The views are the pipeline's image and
    random resized crops of it, without AugMix (see ``_views``), the tuned words those of the template in use, with one
    context for each template; the paper starts from "a photo of a", and its code computes in half precision.

    Made for shifts of distribution, not as a defense. Only the image itself is predicted, so what fools the bare model
    mostly stays: a step of 5e-3 moves few predictions.
    """

    name: ClassVar[str] = "tpt"
    summary: ClassVar[str] = "tunes the prompt to the marginal entropy of confident crops"
    citation: ClassVar[str] = "Shu et al., NeurIPS 2022"
    neutral: ClassVar[dict[str, Any] | None] = {"steps": 0}
    recipe: ClassVar[Recipe] = Recipe(
        "tuned prompt constant, or one unrolled step, best per image; EOT: fresh views at every step", surrogates=2
    )
    reads_all_views: ClassVar[bool] = False

    def loss(self, logits: Tensor, classes: Tensor) -> Tensor:
        """Returns the entropy of the mean probabilities."""
        return marginal_entropy(logits)

    def predict(self, logits: Tensor, features: Tensor, sight: Sight) -> Tensor:
        """Returns the logits of the image itself."""
        return logits[:, 0]
