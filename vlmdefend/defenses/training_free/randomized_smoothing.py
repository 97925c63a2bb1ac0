"""Randomized smoothing: majority vote over noisy copies, with a certified L2 radius."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmdefend.defenses import DEFENSES
from vlmdefend.defenses.base import Defense, Paradigm, Recipe
from vlmdefend.defenses.views.crops import AT_ONCE, mean_score, predict_views
from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng
from vlmdefend.types import Outputs, Pipeline, PixelUnits

if TYPE_CHECKING:
    from numpy.typing import NDArray

TINY = 1e-12
BLOCK = 16  # torch draws normal numbers in blocks: in whole ones the next draw goes on where this one ends


@DEFENSES.register
@dataclass(frozen=True, kw_only=True)
class RandomizedSmoothing(Defense):
    """The class that wins among predictions on x + sigma n, n standard normal, not clamped (Cohen et al. 2019).

    As CERTIFY in that paper, per image: ``selection`` draws choose the class; of ``draws`` further ones k are for it;
    p is the lower Clopper-Pearson bound of k/draws at confidence 1 - alpha. Where p <= 1/2 it abstains, which counts
    as wrong. Else no perturbation of L2 length below sigma Phi^-1(p) changes the infinite vote, except with
    probability alpha; the vote on the perturbed image is drawn anew, and may abstain. The largest radius that the
    draws can show is sigma Phi^-1(alpha^(1/draws)): 1.50 sigma at the default 100, 3.81 sigma at the paper's 100000.

    The certificate is one in L2. An L-infinity ball reaches eps sqrt(3) S at side S: 1.52 for 1/255 at 224 pixels, 0.22
    at 32, so smaller radii say nothing about it. The accuracy under attack says what the attack found, the certified
    accuracy what no attack can find.

    Votes have no gradient, so plain white-box attacks do not move. The adaptive attacker climbs minus the log of the
    mean probability over ``surrogate_draws`` fresh draws (SmoothAdv: Salman et al. 2019, section 3.1). The logits are
    log vote shares; the mean probability, as one vote more, decides between ties and keeps them finite.

    Options:
        sigma: standard deviation in pixel units. The literature on CLIP without noise training uses 4 to 16/255,
            Cohen et al. 0.12 to 1 for models trained on the noise.
        draws, selection: n and n0; 100000 and 100 in the paper.
        alpha: probability that an image's certificate is wrong.
    """

    name: ClassVar[str] = "randomized_smoothing"
    paradigm: ClassVar[Paradigm] = "training-free"
    summary: ClassVar[str] = "majority over noisy copies, with abstention and a certified L2 radius"
    citation: ClassVar[str] = "Cohen et al. 2019"
    stochastic: ClassVar[bool] = True
    certifies: ClassVar[bool] = True
    recipe: ClassVar[Recipe] = Recipe("EOT: log of the mean probability over 32 fresh draws in place of the vote")
    surrogate_draws: ClassVar[int] = 32
    sigma: PixelUnits = 0.1
    draws: int = 100
    selection: int = 20
    alpha: float = 0.001

    def __post_init__(self) -> None:
        if not self.sigma > 0:
            raise UserError(f"randomized_smoothing: sigma={self.sigma} must be more than zero.")
        if self.draws < 1 or self.selection < 1 or not 0 < self.alpha < 1:
            raise UserError(
                f"randomized_smoothing: draws={self.draws} and selection={self.selection} must be at least 1, "
                f"alpha={self.alpha} between 0 and 1."
            )

    def wrap(self, model: Pipeline) -> Pipeline:
        """Votes over noisy copies, bounds the winner's probability, abstains where it is not above one half."""
        return _Vote(model, self)

    def surrogate(self, model: Pipeline) -> Pipeline:
        """The log of the mean probability over noisy copies, which has a gradient."""
        return _MeanProbability(model, self)

    def noisy(self, images: Tensor, rng: ImageRng, draws: int) -> Tensor:
        """Returns (B, draws, 3, H, W) noisy copies; the values do not depend on how many are taken at a time."""
        values = images[0].numel()
        noise = rng.normal((draws, -(-values // BLOCK) * BLOCK))[..., :values].reshape(-1, draws, *images.shape[1:])
        return images[:, None] + self.sigma * noise.to(images.device)

    def certify(self, chosen: Tensor, votes: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (B,) abstained and (B,) certified radius (zero where it abstains) from classes and (B, C) counts."""
        from scipy.stats import norm

        count = votes.gather(1, chosen[:, None])[:, 0].cpu().numpy()
        bound = lower_bound(count, self.draws, self.alpha)
        abstained = torch.as_tensor(bound <= 0.5)
        radius = torch.as_tensor(self.sigma * norm.ppf(bound)).float().masked_fill(abstained, 0.0)
        return abstained.to(votes.device), radius.to(votes.device)


def lower_bound(count: NDArray[Any], draws: int, alpha: float) -> NDArray[Any]:
    """Returns the Clopper-Pearson lower bound at level alpha of a probability of which ``count`` of ``draws`` were
    seen.
    """
    from scipy.stats import beta

    bound: NDArray[Any] = beta.ppf(alpha, count.clip(1), draws - count + 1) * (count > 0)
    return bound


class _Vote:
    """The deployed pipeline: counts predictions over noisy copies; has no gradient."""

    def __init__(self, model: Pipeline, defense: RandomizedSmoothing) -> None:
        self.model, self.defense = model, defense
        self.num_classes = model.num_classes
        self.stochastic = True

    @torch.no_grad()
    def __call__(self, images: Tensor, rng: ImageRng) -> Outputs:
        defense = self.defense
        chosen = self._count(images, rng, defense.selection)[0].argmax(dim=1)
        votes, probability = self._count(images, rng, defense.draws)
        abstained, radius = defense.certify(chosen, votes)
        logits = ((votes + probability / defense.draws).clamp_min(TINY) / (defense.draws + 1)).log()
        return Outputs(logits, abstained=abstained, certified_radius=radius)

    def _count(self, images: Tensor, rng: ImageRng, draws: int) -> tuple[Tensor, Tensor]:
        """Returns (B, C) votes and the sum of probabilities, as many draws at a time as the model takes."""
        votes = images.new_zeros(len(images), self.num_classes)
        probability = votes.clone()
        at_once = max(1, AT_ONCE // len(images))
        for first in range(0, draws, at_once):
            noisy = self.defense.noisy(images, rng, min(at_once, draws - first))
            logits = predict_views(self.model, noisy, rng).logits
            votes += F.one_hot(logits.argmax(dim=-1), self.num_classes).sum(dim=1)
            probability += logits.softmax(dim=-1).sum(dim=1)
        return votes, probability


class _MeanProbability:
    """The surrogate: the log of the mean probability, which the adaptive attacker differentiates."""

    def __init__(self, model: Pipeline, defense: RandomizedSmoothing) -> None:
        self.model, self.defense = model, defense
        self.num_classes = model.num_classes
        self.stochastic = True

    def __call__(self, images: Tensor, rng: ImageRng) -> Outputs:
        noisy = self.defense.noisy(images, rng, self.defense.surrogate_draws)
        outputs = predict_views(self.model, noisy, rng)
        log_mean = outputs.logits.log_softmax(dim=-1).logsumexp(dim=1) - math.log(noisy.shape[1])
        features = None if outputs.features is None else outputs.features.mean(dim=1)
        return Outputs(log_mean, features, mean_score(outputs))
