"""TTP: detects by the effect of a fixed border, tunes a border, averages over framed crops (test-time padding)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmdefend.defenses import DEFENSES
from vlmdefend.defenses.base import Defense, Paradigm, Recipe, features_of
from vlmdefend.defenses.test_time._prompt_tuning import Adam
from vlmdefend.defenses.training_free._counter_attack import pixel_gradient
from vlmdefend.defenses.views.border import framed
from vlmdefend.defenses.views.crops import augmented_views, entropy, most_confident, pick, predict_views
from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng
from vlmdefend.types import Outputs, Pipeline, Shade

SHADES = {"black": 0.0, "white": 1.0}


@DEFENSES.register
@dataclass(frozen=True, kw_only=True)
class Ttp(Defense):
    """Test-time padding (Li et al., CVPR 2026, 2512.16523): detect by a fixed border, adapt a trainable one.

    An image is taken for adversarial where cos(z(x), z(pad x)) is at most ``threshold``; others are predicted as they
    are. For what is taken for adversarial, one border p is drawn, uniform in [0, brightest], and put around each of
    ``views`` crops v_i; on the ``keep`` most confident, p takes ``steps`` steps down the mean entropy. Then

        logits = sum_i w_i logits(pad_p v_i),   w = softmax_i(cos(z(pad_p v_i), z(pad_p x)) - cos(z(pad_p v_i), z(x)))

    No code is public, and only a summary of the paper was read. Our reading: ``lr`` counts levels of 256, as the
    border's start does, and the step is Adam's, one sign step of 5 levels (a plain gradient of an entropy per level is
    so small that 5 times it moves nothing: ``step=gradient``); p stays in [0, 1]; all views are averaged, logits not
    probabilities (``average=confident`` for those that p was tuned on). A CLIP model takes one size, so image and
    border together are shrunk to it, and p is drawn and tuned after the shrinking.

    Deployed, autograd sees the tuned border as a constant. The adaptive attacker draws it anew at every step and tries
    that constant and the unrolled step, each with and without a term that keeps the cosine above the threshold, and
    what fools the bare model.

    Options:
        threshold: on the cosine; -1 takes nothing for adversarial.
        border: width on each side before shrinking, as a share of the image's side; 32 of 224 pixels.
        shade: of the fixed border that detects.
        brightest: values of the border's start are uniform in [0, brightest].
        views: the image counts as one.
        keep: share of the views, those of lowest entropy, on which the border is tuned.
        lr: in levels of 256.
        steps: on the border.
        step: adam, or the plain gradient.
        average: all views, or the confident.
    """

    name: ClassVar[str] = "ttp"
    paradigm: ClassVar[Paradigm] = "test-time adaptation"
    summary: ClassVar[str] = "where a border moves the embedding, tunes the border and averages framed crops"
    citation: ClassVar[str] = "Li et al., CVPR 2026"
    stochastic: ClassVar[bool] = True
    follows_gradient: ClassVar[bool] = True
    neutral: ClassVar[dict[str, Any] | None] = {"threshold": -1.0}
    recipe: ClassVar[Recipe] = Recipe(
        "BPDA: tuned border constant, unrolled, or ignored, best per image; EOT: fresh views and border at every step, "
        "mean gradient over 2 draws; cosine pushed over the threshold",
        samples=2,
        detector_weights=(0.0, 10.0),
        surrogates=2,
        bare=True,
    )
    threshold: float = 0.8
    border: float = 32 / 224
    shade: Literal["black", "white"] = "black"
    brightest: Shade = 10 / 255
    views: int = 64
    keep: float = 0.1
    lr: float = 5.0
    steps: int = 1
    step: Literal["adam", "gradient"] = "adam"
    average: Literal["all", "confident"] = "all"

    def __post_init__(self) -> None:
        if self.views < 1 or self.steps < 0 or self.lr < 0:
            raise UserError(
                f"ttp: views={self.views} must be at least 1, steps={self.steps} and lr={self.lr} zero or more."
            )
        if not 0 < self.keep <= 1 or not 0 <= self.border <= 1 or not 0 <= self.brightest <= 1:
            raise UserError(
                f"ttp: keep={self.keep} must be in (0, 1], border={self.border} and brightest={self.brightest} in "
                "[0, 1]."
            )

    def wrap(self, model: Pipeline) -> Pipeline:
        """Detects, and adapts to the detected images."""
        return _Padded(model, self)

    def surrogate(self, model: Pipeline) -> Pipeline:
        """Treats the tuned border as a constant, as it is deployed."""
        return self.wrap(model)

    def surrogates(self, model: Pipeline) -> tuple[Pipeline, ...]:
        """Returns the constant and the unrolled surrogate."""
        return self.surrogate(model), _Padded(model, self, unrolled=True)

    def weights(self, padded: Tensor, own: Tensor) -> Tensor:
        """Returns (B, V) view weights of sum 1 from features of padded views and of the bare image."""
        units = F.normalize(padded, dim=-1)
        away = units[:, 0] - F.normalize(own, dim=-1)
        return (units @ away[..., None])[..., 0].softmax(dim=-1)


class _Padded:
    def __init__(self, model: Pipeline, defense: Ttp, *, unrolled: bool = False) -> None:
        self.model, self.defense, self.unrolled = model, defense, unrolled
        self.num_classes, self.stochastic = model.num_classes, True

    def __call__(self, images: Tensor, rng: ImageRng) -> Outputs:
        defense = self.defense
        own = self.model(images, rng)
        if own.features is None:
            raise UserError("defense ttp compares image features; this model gives logits only; use random_pad.")
        fixed = framed(images, torch.tensor(SHADES[defense.shade], device=images.device), defense.border)
        agreement = F.cosine_similarity(own.features, features_of(self.model(fixed, rng)), dim=1)
        suspect = (agreement <= defense.threshold).nonzero()[:, 0]
        logits, features = own.logits, own.features
        if len(suspect):
            adapted = self._adapted(images[suspect], features[suspect], rng.select(suspect))
            logits = logits.index_copy(0, suspect, adapted.logits)
            features = features.index_copy(0, suspect, features_of(adapted))
        return Outputs(logits, features, defense.threshold - agreement)

    def _adapted(self, images: Tensor, own: Tensor, rng: ImageRng) -> Outputs:
        """Predicts framed crops of the images with the border tuned for each image."""
        defense = self.defense
        views = augmented_views(images, rng, defense.views)
        border = rng.uniform(images.shape[1:], 0.0, defense.brightest).to(images)
        with torch.no_grad():
            confident = most_confident(self._seen(views, border, rng).logits, defense.keep)
        chosen = pick(views, confident)
        border = self._tuned(chosen, border, rng)
        if defense.average == "confident":  # with the image, which the weights need
            views = torch.cat([views[:, :1], chosen], dim=1)
        seen = self._seen(views, border, rng)
        weights = defense.weights(features_of(seen), own)
        logits, features = seen.logits, features_of(seen)
        if defense.average == "confident":
            weights = weights[:, 1:] / weights[:, 1:].sum(dim=1, keepdim=True)
            logits, features = logits[:, 1:], features[:, 1:]
        return Outputs((weights[:, None] @ logits)[:, 0], (weights[:, None] @ features)[:, 0])

    def _tuned(self, chosen: Tensor, border: Tensor, rng: ImageRng) -> Tensor:
        """Returns the (B, 3, H, W) border after ``steps`` on the (B, k, 3, H, W) confident views."""
        defense, adam = self.defense, Adam()
        unrolled = self.unrolled and torch.is_grad_enabled() and chosen.requires_grad
        chosen, border = (chosen, border.requires_grad_(True)) if unrolled else (chosen.detach(), border)
        for _ in range(defense.steps):
            gradient, _values = pixel_gradient(
                lambda at: entropy(self._seen(chosen, at, rng).logits).mean(dim=1), border, unrolled=unrolled
            )
            step = adam(gradient) if defense.step == "adam" else gradient / 255
            border = (border - defense.lr / 255 * step).clamp(0.0, 1.0)
        return border

    def _seen(self, views: Tensor, border: Tensor, rng: ImageRng) -> Outputs:
        """Predicts (B, V, 3, H, W) views in their (B, 3, H, W) border."""
        return predict_views(self.model, framed(views, border[:, None], self.defense.border), rng)
