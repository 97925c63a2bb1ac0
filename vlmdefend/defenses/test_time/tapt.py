"""TAPT: tunes tokens in both towers for agreement of the views and for known token statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from vlmdefend.defenses import DEFENSES
from vlmdefend.defenses.base import Recipe
from vlmdefend.defenses.test_time._deep_tuning import DeepTuned
from vlmdefend.defenses.test_time._prompt_tuning import PromptTuning, Sight
from vlmdefend.defenses.test_time._token_statistics import Moments, TokenStatistics
from vlmdefend.defenses.views.crops import marginal_entropy
from vlmdefend.errors import UserError
from vlmdefend.types import Amplitude, Pipeline


@DEFENSES.register
@dataclass(frozen=True, kw_only=True)
class Tapt(PromptTuning):
    """Test-time adversarial prompt tuning (Wang et al., CVPR 2025, and the official code).

    One AdamW step for each image on tokens inside of both towers: ``contexts`` of them at each of the first ``depth``
    blocks, as MaPLe and IVLP put them there. The loss is H(mean_v p_v) of the confident views, plus

        weight / depth  sum_l  gamma d_l(adversarial) + (1 - gamma) d_l(clean)

    where d_l compares mean and variance over the views of each token that block l reads with those over images that are
    known. Only the image itself is predicted, with its own tokens, which are then forgotten.

    The paper starts from tokens that were trained adversarially on ImageNet, and what it gains is mostly theirs. Where
    the model has learned such tokens, these are tuned. A plain model's text tokens start from its own words and what it
    makes of them, which changes nothing, its image tokens from small random ones, which changes a little; without a
    step there are none. Image tokens need a vision transformer: of a ResNet only the text is tuned, and nothing is
    aligned. The code leaves out the last of its nine blocks in the sum; here all count.

    Statistics of adversarial images say something about the attack: another attack meets a defense that does not expect
    it. Without ``statistics`` the entropy alone is minimised, which the paper has as an ablation. A file is written by
    ``Tapt().measure(classifier, clean, adversarial).save("FILE.safetensors")``.

    Options:
        contexts: tokens per block.
        depth: blocks with tokens of their own; a shorter tower has them at all of its blocks.
        statistics: a .safetensors file, or a data set of whose training split ``known`` images are measured, clean and
            after 10 steps of PGD against the bare model's predictions; in brackets where its name has a colon.
        known: images measured.
        known_eps: radius of that attack, L-infinity.
        gamma: 1 aligns with adversarial images only, 0 with clean ones.
        weight: of the alignment.
    """

    name: ClassVar[str] = "tapt"
    summary: ClassVar[str] = "tunes tokens inside both towers, aligns them with known statistics"
    citation: ClassVar[str] = "Wang et al., CVPR 2025"
    changes: ClassVar[str] = "prompt, tokens"
    follows_gradient: ClassVar[bool] = True
    neutral: ClassVar[dict[str, Any] | None] = {"steps": 0}
    recipe: ClassVar[Recipe] = Recipe(
        "tuned tokens constant, or one unrolled step, or what fools the bare model, best per image; EOT: fresh views "
        "at every step",
        surrogates=2,
        bare=True,
    )
    reads_all_views: ClassVar[bool] = False
    lr: float = 5e-4
    contexts: int = 2
    depth: int = 9
    statistics: str | None = None
    known: int = 64
    known_eps: Amplitude = 4 / 255
    gamma: float = 0.5
    weight: float = 100.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.contexts < 1 or self.depth < 1 or self.known < 2:
            raise UserError(
                f"tapt: contexts={self.contexts} and depth={self.depth} must be at least 1, known={self.known} at "
                "least 2."
            )
        if not 0 <= self.gamma <= 1 or self.weight < 0 or self.known_eps < 0:
            raise UserError(
                f"tapt: gamma={self.gamma} must be in [0, 1], weight={self.weight} and known_eps={self.known_eps} zero "
                "or more."
            )

    def wrap(self, model: Pipeline) -> Pipeline:
        """Returns a pipeline that tunes tokens on each image and then predicts."""
        return DeepTuned(model, self)

    def surrogate(self, model: Pipeline) -> Pipeline:
        """Treats the tuned tokens as constants, as they are deployed."""
        return self.wrap(model)

    def surrogates(self, model: Pipeline) -> tuple[Pipeline, ...]:
        """Returns the constant and the unrolled surrogate."""
        return self.surrogate(model), DeepTuned(model, self, unrolled=True)

    def loss(self, logits: Tensor, classes: Tensor) -> Tensor:
        """Returns the entropy of the mean probabilities."""
        return marginal_entropy(logits)

    def alignment(self, blocks: Sequence[Tensor], known: TokenStatistics) -> Tensor:
        """Returns (B,) the weighted distance of D (B, k, L, V) tokens to the known statistics."""
        apart = self.gamma * known.adversarial.distance(blocks) + (1 - self.gamma) * known.clean.distance(blocks)
        return self.weight / len(blocks) * apart

    def predict(self, logits: Tensor, features: Tensor, sight: Sight) -> Tensor:
        """Returns the logits of the image itself."""
        return logits[:, 0]

    def measure(self, model: Pipeline, clean: Tensor, adversarial: Tensor) -> TokenStatistics:
        """Returns the statistics of two sets of (N, 3, H, W) images in [0, 1], with the initial tokens.

        Raises:
            UserError: the model has no vision transformer.
        """
        tuned = DeepTuned(model, replace(self, statistics=None))
        return TokenStatistics(*(Moments.of(tuned.tokens(images)) for images in (clean, adversarial)))
