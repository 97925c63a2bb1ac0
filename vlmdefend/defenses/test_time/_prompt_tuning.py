"""The engine of prompt tuning: confident views, and a few AdamW steps on each image's own context."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vlmdefend.attacks.bpda import bpda
from vlmdefend.defenses.base import Defense, Paradigm, features_of
from vlmdefend.defenses.views.crops import augmented_views, mean_score, most_confident, pick, predict_views
from vlmdefend.errors import UserError
from vlmdefend.models.prompts.prompt_tower import PromptTower
from vlmdefend.models.zero_shot.classifier import ZeroShotClassifier
from vlmdefend.models.zero_shot.text_side import TextSide
from vlmdefend.rng import ImageRng
from vlmdefend.types import Outputs, Pipeline

# What autograd sees. ``cut``: as published, the tuned class features are constants. ``constant``: the same, and the
# prediction has a gradient that serves an attacker better than its own, where there is one. ``unrolled``: as
# ``constant``, but the tuned class features are a function of the image.
Sight = Literal["cut", "constant", "unrolled"]

# AdamW with the defaults of torch, which the official codes use
BETA1, BETA2, EPSILON, WEIGHT_DECAY = 0.9, 0.999, 1e-8, 0.01


@dataclass(frozen=True, kw_only=True)
class PromptTuning(Defense):
    """A defense that tunes the context before the class name on views of one image, and restores it.

    Deployed, as in the official codes, autograd sees the tuned class features as constants. The adaptive attacker
    tunes anew on fresh views at every step and tries two surrogates, best per image: those constants, and the unrolled
    tuning, where second derivatives flow through the loss and the text tower, and AdamW's first step, which is all but
    a sign, has the slope of a soft sign.

    No parameter of the model is an optimizer's: each image has its own copy of the context and of AdamW's state, which
    live as long as the call. Images do not see each other, so a batch gives what one image at a time gives.

    Where an attack changed the prompts, the tuned class features move by what it changed in the untuned ones.

    Options:
        views: the image counts as one.
        keep: share of the views, those of lowest entropy, on which the context is tuned.
        lr: of AdamW (weight decay 0.01).
        steps: 0 tunes nothing.
        augmix: each crop is mixed with mild random changes of it, as the official codes do on fine-grained sets.
    """

    paradigm: ClassVar[Paradigm] = "test-time adaptation"
    changes: ClassVar[str] = "prompt"
    stochastic: ClassVar[bool] = True
    reads_all_views: ClassVar[bool]  # the prediction is made of all views, not of the image alone
    views: int = 64
    keep: float = 0.1
    lr: float = 5e-3
    steps: int = 1
    augmix: bool = False

    def __post_init__(self) -> None:
        if self.views < 1 or not 0 < self.keep <= 1:
            raise UserError(f"{self.name}: views={self.views} must be at least 1, keep={self.keep} in (0, 1].")
        if self.steps < 0 or self.lr < 0:
            raise UserError(f"{self.name}: steps={self.steps} and lr={self.lr} must be zero or more.")

    @abstractmethod
    def loss(self, logits: Tensor, classes: Tensor) -> Tensor:
        """Returns (B,) losses of the (B, k, C) logits of confident views and their (B, C, D) unit class features."""

    @abstractmethod
    def predict(self, logits: Tensor, features: Tensor, sight: Sight) -> Tensor:
        """Returns (B, C) logits from (B, V, C) tuned logits and (B, V, D) features of the views."""

    def wrap(self, model: Pipeline) -> Pipeline:
        """Returns a pipeline that tunes prompts on each image and then predicts."""
        return Tuned(model, self, "cut")

    def surrogate(self, model: Pipeline) -> Pipeline:
        """Treats the tuned class features as constants."""
        return Tuned(model, self, "constant")

    def surrogates(self, model: Pipeline) -> tuple[Pipeline, ...]:
        """Returns the constant and the unrolled surrogate."""
        return self.surrogate(model), Tuned(model, self, "unrolled")


class Tuned:
    """A classifier that tunes its prompts for each image."""

    def __init__(self, model: Pipeline, defense: PromptTuning, sight: Sight) -> None:
        self.model, self.defense, self.sight = model, defense, sight
        self.num_classes, self.stochastic = model.num_classes, True
        self.tower = PromptTower(_text_side(model, defense.name))

    def __call__(self, images: Tensor, rng: ImageRng) -> Outputs:
        """Makes views, tunes, predicts; opens its own graph inside ``no_grad``."""
        defense = self.defense
        read = defense.views if defense.reads_all_views else 1
        if not defense.steps and read == 1:
            return self.model(images, rng)
        unrolled = self.sight == "unrolled" and torch.is_grad_enabled() and images.requires_grad
        views = augmented_views(images, rng, defense.views, mixed=defense.augmix)
        seen = predict_views(self.model, views[:, :read], rng)
        features = features_of(seen)
        classes = None
        if defense.steps:
            confident = self._confident(views, seen, rng, unrolled=unrolled)
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH) if unrolled else nullcontext():
                classes = self._tuned(confident if unrolled else confident.detach(), unrolled=unrolled)
        logits = seen.logits if classes is None else self._classifier.logits(features, classes)
        predicted = defense.predict(logits, features, self.sight)
        return Outputs(predicted, features[:, 0] if read == 1 else features.mean(dim=1), mean_score(seen))

    @property
    def _classifier(self) -> ZeroShotClassifier:
        return self.tower.side.classifier

    def _confident(self, views: Tensor, seen: Outputs, rng: ImageRng, *, unrolled: bool) -> Tensor:
        """Returns (B, k, D) features of the confident views; predicts only those not predicted before."""
        read, features = seen.logits.shape[1], features_of(seen)
        if read == views.shape[1]:
            return pick(features, most_confident(seen.logits, self.defense.keep))
        with torch.no_grad():
            others = predict_views(self.model, views[:, read:], rng)
        all_logits = torch.cat([seen.logits.detach(), others.logits], dim=1)
        chosen = most_confident(all_logits, self.defense.keep)
        if unrolled:  # the few that count once more, with a graph
            return features_of(predict_views(self.model, pick(views, chosen), rng))
        return pick(torch.cat([features.detach(), features_of(others)], dim=1), chosen)

    def _tuned(self, confident: Tensor, *, unrolled: bool) -> Tensor:
        """Returns (B, C, D) class features after ``steps`` of AdamW on each image's context."""
        defense, tower = self.defense, self.tower
        context = tower.context.expand(len(confident), *tower.context.shape)
        attacked = self._classifier.text_features - tower.classes
        classes = tower.classes.expand(len(confident), *tower.classes.shape)
        adam = Adam()
        for _ in range(defense.steps):
            if unrolled:
                context = context if context.requires_grad else context.clone().requires_grad_(True)
                given = self._shifted(tower(context), attacked)
                loss = defense.loss(self._classifier.logits(confident, given), given).sum()
                (gradient,) = torch.autograd.grad(loss, context, create_graph=True)
            else:
                leaf = classes.detach().requires_grad_(True)
                given = self._shifted(leaf, attacked.detach())
                loss = defense.loss(self._classifier.logits(confident, given), given).sum()
                gradient = tower.gradient(context, torch.autograd.grad(loss, leaf)[0])
            context = context * (1 - defense.lr * WEIGHT_DECAY) - defense.lr * adam(gradient)
            with torch.set_grad_enabled(unrolled):
                classes = tower(context)
        return self._shifted(classes, attacked)

    @staticmethod
    def _shifted(classes: Tensor, attacked: Tensor) -> Tensor:
        """Adds to class features the shift that an attack on the prompts gave the untuned ones."""
        moved: Tensor = torch.nn.functional.normalize(classes + attacked, dim=-1)
        return moved


class Adam:
    """The direction of each step of Adam (Kingma & Ba 2015), elementwise, with a slope for unrolling.

    The slope is that of g / (|g| + mean |g|), g the first moment: Adam's own is zero but for g of about 1e-8.
    """

    def __init__(self) -> None:
        self._step, self._first, self._second = 0, torch.zeros(()), torch.zeros(())

    def __call__(self, gradient: Tensor) -> Tensor:
        """(B, ...) gradient -> (B, ...) direction, of about unit size."""
        self._step += 1
        self._first = BETA1 * self._first + (1 - BETA1) * gradient
        self._second = BETA2 * self._second + (1 - BETA2) * gradient.detach().square()
        length = (self._second / (1 - BETA2**self._step)).sqrt() + EPSILON
        first = self._first / (1 - BETA1**self._step)
        if not first.requires_grad:
            return first / length
        direction: Tensor = bpda(lambda moment: moment / length, soft_sign)(first)
        return direction


def soft_sign(gradient: Tensor) -> Tensor:
    """Returns (B, ...) g / (|g| + the mean |g| of the image)."""
    scale = gradient.detach().abs().flatten(1).mean(dim=1).clamp_min(1e-30)
    return gradient / (gradient.abs() + scale.view(-1, *[1] * (gradient.dim() - 1)))


def _text_side(model: Any, defense: str) -> TextSide:
    """Where the prompts of ``model`` can be changed.

    Raises:
        UserError: nowhere.
    """
    side: TextSide | None = getattr(model, "text_side", None)
    if side is None:
        raise UserError(
            f"defense {defense} tunes the prompts, but {type(model).__name__} has no text tower that can be reached; "
            "use a classifier built by VisionLanguageModel.zero_shot, or defense ensemble."
        )
    return side
