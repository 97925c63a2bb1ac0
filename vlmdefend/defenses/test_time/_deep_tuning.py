"""A classifier that tunes deep tokens of both towers for each image of a batch, and restores them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vlmdefend.defenses.base import features_of
from vlmdefend.defenses.test_time._prompt_tuning import WEIGHT_DECAY, Adam, Sight, Tuned, _text_side
from vlmdefend.defenses.test_time._token_statistics import TokenStatistics, known_images
from vlmdefend.defenses.views.crops import AT_ONCE, augmented_views, by_view, mean_score, most_confident, pick
from vlmdefend.errors import UserError
from vlmdefend.models.prompts.image_prompts import (
    DeepPromptTower,
    ImagePrompts,
    block_inputs,
    first_image_tokens,
    image_blocks,
    reading,
)
from vlmdefend.models.zero_shot.classifier import ZeroShotClassifier
from vlmdefend.rng import ImageRng
from vlmdefend.types import Outputs, Pipeline

FILE_ENDING = ".safetensors"


class TokenTuning(Hashable, Protocol):
    """Options and losses of a method that tunes tokens inside both towers; ``tapt`` is one.

    The properties are the options of :class:`~vlmdefend.defenses.test_time.tapt.Tapt`, where each is explained.
    """

    @property
    def name(self) -> str: ...
    @property
    def views(self) -> int: ...
    @property
    def keep(self) -> float: ...
    @property
    def lr(self) -> float: ...
    @property
    def steps(self) -> int: ...
    @property
    def augmix(self) -> bool: ...
    @property
    def contexts(self) -> int: ...
    @property
    def depth(self) -> int: ...
    @property
    def statistics(self) -> str | None: ...
    @property
    def known(self) -> int: ...
    @property
    def known_eps(self) -> float: ...

    def loss(self, logits: Tensor, classes: Tensor) -> Tensor:
        """Returns the loss that tuning minimises, without the alignment term."""
        ...

    def alignment(self, blocks: Sequence[Tensor], known: TokenStatistics) -> Tensor:
        """Returns the distance per image between its token statistics and the measured ones."""
        ...

    def predict(self, logits: Tensor, features: Tensor, sight: Sight) -> Tensor:
        """Returns (B, C) logits from those of all views after tuning."""
        ...

    def measure(self, model: Pipeline, clean: Tensor, adversarial: Tensor) -> TokenStatistics:
        """Returns the token statistics of known clean and adversarial images."""
        ...


_MEASURED: WeakKeyDictionary[ZeroShotClassifier, dict[TokenTuning, TokenStatistics]] = WeakKeyDictionary()


class DeepTuned:
    """Tunes tokens by the loss of ``defense``; ``unrolled``: autograd follows the tuning steps."""

    def __init__(self, model: Pipeline, defense: TokenTuning, *, unrolled: bool = False) -> None:
        self.model, self.defense, self.unrolled = model, defense, unrolled
        self.num_classes, self.stochastic = model.num_classes, True
        self.tower = DeepPromptTower(_text_side(model, defense.name), defense.contexts, defense.depth)
        self.visual = first_image_tokens(self._clip, defense.contexts, defense.depth)  # (D, N, V)
        self.known = self._statistics() if defense.statistics is not None and defense.steps else None

    def __call__(self, images: Tensor, rng: ImageRng) -> Outputs:
        """Makes views, tunes, predicts; opens its own graph inside ``no_grad``."""
        defense = self.defense
        if not defense.steps:
            return self.model(images, rng)
        unrolled = self.unrolled and torch.is_grad_enabled() and images.requires_grad
        views = augmented_views(images, rng, defense.views, mixed=defense.augmix)
        with torch.no_grad():
            seen = self._classifier.logits(features_of(self._seen(views, self._start(len(images)), rng)))
            confident = most_confident(seen, defense.keep)
        chosen = pick(views, confident)
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH) if unrolled else nullcontext():
            visual, classes = self._tuned(chosen if unrolled else chosen.detach(), rng, unrolled=unrolled)
        last = self._seen(images[:, None], visual, rng)
        features = features_of(last)
        predicted = defense.predict(self._classifier.logits(features, classes), features, "cut")
        return Outputs(predicted, features[:, 0], mean_score(last))

    def tokens(self, images: Tensor) -> list[Tensor]:
        """(N, 3, H, W) -> D (N, L, V) tokens that the blocks read, with those that tuning starts from.

        Raises:
            UserError: the image tower has none.
        """
        if self.visual is None:
            raise UserError(
                "tapt: statistics are those of a vision transformer's tokens, and this model's image tower is "
                f"{type(self._clip.visual).__name__}; use statistics=none, or a ViT."
            )
        kept: list[Tensor] = []
        with torch.no_grad():
            rng = ImageRng(0, [str(number) for number in range(len(images))])
            self._seen(images[:, None], self._start(len(images)), rng, kept)
        return [block[:, 0] for block in kept]

    @property
    def _classifier(self) -> ZeroShotClassifier:
        return self.tower.side.classifier

    @property
    def _clip(self) -> Any:
        return self._classifier.clip

    def _start(self, count: int) -> Tensor | None:
        """Returns the (B, D, N, V) initial image tokens, the same for all."""
        return None if self.visual is None else self.visual.expand(count, *self.visual.shape)

    def _seen(self, views: Tensor, visual: Tensor | None, rng: ImageRng, kept: list[Tensor] | None = None) -> Outputs:
        """Predicts (B, k, 3, H, W) views with the (B, D, N, V) tokens of their images.

        Args:
            kept: gets what each of the D blocks reads, (B, k, L, V).
        """
        owners = torch.arange(len(views)).repeat_interleave(views.shape[1])
        blocks = image_blocks(self._clip) if kept is not None and visual is not None else None
        found, read = [], []
        for at, flat in zip(torch.split(owners, AT_ONCE), torch.split(views.flatten(0, 1), AT_ONCE), strict=True):
            tokens = None if visual is None else visual[at.to(visual.device)].transpose(0, 1)
            with reading(self._clip, ImagePrompts(visual=tokens)), block_inputs(blocks, _length(tokens)) as inputs:
                found.append(self.model(flat, rng.select(at)))
            read.append(inputs)
        if kept is not None:
            whole = [torch.cat(parts) for parts in zip(*read, strict=True)]
            kept.extend(block.view(*views.shape[:2], *block.shape[1:]) for block in whole)
        return by_view(found, views.shape[:2])

    def _tuned(self, chosen: Tensor, rng: ImageRng, *, unrolled: bool) -> tuple[Tensor | None, Tensor]:
        """Returns each image's tuned (B, D, N, V) tokens and (B, C, F) class features."""
        defense, tower = self.defense, self.tower
        visual, text, classes = (
            self._start(len(chosen)),
            tower.context.expand(len(chosen), *tower.context.shape),
            tower.classes.expand(len(chosen), *tower.classes.shape),
        )
        attacked = self._classifier.text_features - tower.classes
        words, tokens = Adam(), Adam()
        for _ in range(defense.steps):
            visual = None if visual is None else _leaf(visual, unrolled=unrolled)
            if unrolled:
                leaf = text = _leaf(text, unrolled=True)
                seen = Tuned._shifted(tower(text), attacked)
            else:
                leaf = _leaf(classes, unrolled=False)
                seen = Tuned._shifted(leaf, attacked.detach())
            kept: list[Tensor] = []
            features = features_of(self._seen(chosen, visual, rng, kept))
            loss = defense.loss(self._classifier.logits(features, seen), seen)
            if self.known is not None:
                loss = loss + defense.alignment(kept, self.known)
            wanted = [leaf] if visual is None else [leaf, visual]
            first, *others = torch.autograd.grad(loss.sum(), wanted, create_graph=unrolled)
            text = self._stepped(text, words(first if unrolled else tower.gradient(text, first)))
            if visual is not None:
                visual = self._stepped(visual if unrolled else visual.detach(), tokens(others[0]))
            with torch.set_grad_enabled(unrolled):
                classes = tower(text)
        return visual, Tuned._shifted(classes, attacked)

    def _stepped(self, values: Tensor, direction: Tensor) -> Tensor:
        return values * (1 - self.defense.lr * WEIGHT_DECAY) - self.defense.lr * direction

    def _statistics(self) -> TokenStatistics:
        """Returns the token statistics that the options name; those of a data set are measured once per classifier.

        Raises:
            UserError: there are none, or they are of other tokens than this model has.
        """
        defense, classifier = self.defense, self._classifier
        if self.visual is None:
            self.tokens(classifier.text_features)  # says why there are none
        assert self.visual is not None
        text = (defense.statistics or "").removeprefix("[").removesuffix("]")
        measured = _MEASURED.setdefault(classifier, {})
        if text.endswith(FILE_ENDING):
            known = TokenStatistics.load(text)
        elif defense in measured:
            known = measured[defense]
        else:
            clean, adversarial = known_images(text, classifier, defense.known, defense.known_eps)
            known = measured[defense] = defense.measure(self.model, clean, adversarial)
        depth, count, width = self.visual.shape
        expected = depth, len(self._clip.visual.positional_embedding) + count, width
        if known.clean.mean.shape != expected:
            raise UserError(
                f"tapt: statistics={defense.statistics} are of {tuple(known.clean.mean.shape)} blocks, tokens and "
                f"entries, the model with its tokens has {expected}; measure them with this model and these options."
            )
        return known.on(classifier.text_features.device)


def _leaf(values: Tensor, *, unrolled: bool) -> Tensor:
    """Returns a tensor to differentiate with respect to; ``unrolled`` keeps the graph that it comes with."""
    if unrolled and values.requires_grad:
        return values
    return values.detach().clone().requires_grad_(True)


def _length(tokens: Tensor | None) -> int:
    return 0 if tokens is None else len(tokens)
