"""Interpolate: the mean of bare and defended model, a control for the trade-off between the two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch.nn.functional as F
from torch import Tensor

from vlmdefend.defenses import DEFENSES
from vlmdefend.defenses.base import Defense, Paradigm, Recipe
from vlmdefend.defenses.composed import create_defense
from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng
from vlmdefend.types import EmbeddingPipeline, Outputs, Pipeline

TINY = 1e-12


@DEFENSES.register
@dataclass(frozen=True, kw_only=True)
class Interpolate(Defense):
    """Mixes (1 - weight) of the bare model with ``weight`` of the model inside another defense.

    At 0 it is the bare model, at 1 the other defense, exactly and at their cost. Between, of outputs with features z
    (bare) and z' (defended), unit vectors,

        logits = logits(z'') + weight (logits' - logits(z')),   z'' = (1 - weight) z + weight z'

    where logits(z) is the model's logits for an embedding: the second term is what the defense does beside moving the
    embedding (tuned prompts, a mean of logits), in the same proportion. Where either has no features, or the model
    takes none, their logits are mixed.

    A defense worth its cost lies above the line that this control draws between its two ends. The adaptive attacker
    has the other defense's surrogates, draws and detector term, mixed in the same way, and what fools the bare model.

    Options:
        of: the other defense, ``jpeg``; in brackets with its options, ``[jpeg:quality=50]``.
        weight: in [0, 1].
        on: features, as above; or logits; or probabilities, whose logarithm is returned.
    """

    name: ClassVar[str] = "interpolate"
    paradigm: ClassVar[Paradigm] = "training-free"
    summary: ClassVar[str] = "the mean of the bare model and another defense"
    citation: ClassVar[str] = "control"
    changes: ClassVar[str] = "as the mixed defense"
    neutral: ClassVar[dict[str, Any] | None] = {"weight": 0.0}
    recipe: ClassVar[Recipe] = Recipe("that of the other defense, mixed; what fools the bare model is tried too")
    of: str = "jpeg"
    weight: float = 0.5
    on: Literal["features", "logits", "probabilities"] = "features"

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise UserError(f"interpolate: weight={self.weight} must be in [0, 1].")
        other = self.other
        if other.name == "none":
            raise UserError(
                f"interpolate: of={self.of} is the bare model itself; give a defense, jpeg, in brackets with its "
                "options, [jpeg:quality=50]."
            )
        if other.certifies or other.rejects:
            raise UserError(
                f"interpolate: {other.name} certifies or rejects images, and half of that means nothing; "
                "choose a defense that only predicts."
            )
        recipe = other.recipe._replace(text=f"{other.recipe.text}; mixed with the bare model", bare=True)
        for attribute, value in (
            ("recipe", recipe),
            ("stochastic", other.stochastic),
            ("follows_gradient", other.follows_gradient),
            ("paradigm", "training-free" if other.paradigm == "none" else other.paradigm),
        ):  # of the other defense, so of this one defense and not of its class
            object.__setattr__(self, attribute, value)

    @property
    def other(self) -> Defense:
        """The defense that is mixed in."""
        return create_defense(self.of[1:-1] if self.of.startswith("[") and self.of.endswith("]") else self.of)

    @property
    def inner(self) -> tuple[Defense, ...]:
        """The other defense."""
        return (self.other,)

    def wrap(self, model: Pipeline) -> Pipeline:
        """Predicts without and with the other defense, mixes the logits."""
        return self.mixed(model, self.other.wrap(model))

    def surrogate(self, model: Pipeline) -> Pipeline:
        """Returns the other defense's surrogate, mixed."""
        return self.mixed(model, self.other.surrogate(model))

    def surrogates(self, model: Pipeline) -> tuple[Pipeline, ...]:
        """Returns all surrogates of the other defense, mixed."""
        return tuple(self.mixed(model, surrogate) for surrogate in self.other.surrogates(model))

    def mixed(self, model: Pipeline, defended: Pipeline) -> Pipeline:
        """Mixes the bare and the defended model in their proportions."""
        return defended if self.weight == 1 else _Mixed(model, defended, self)


class _Mixed:
    def __init__(self, model: Pipeline, defended: Pipeline, defense: Interpolate) -> None:
        self.model, self.defended, self.defense = model, defended, defense
        self.num_classes, self.stochastic = model.num_classes, defended.stochastic

    def __call__(self, images: Tensor, rng: ImageRng) -> Outputs:
        bare, weight = self.model(images, rng), self.defense.weight
        if weight == 0:
            return bare
        other = self.defended(images, rng)
        features = None
        if bare.features is not None and other.features is not None:
            units = F.normalize(bare.features, dim=1), F.normalize(other.features, dim=1)
            features = (1 - weight) * units[0] + weight * units[1]
        return Outputs(self._logits(bare, other, features), features, other.detector_score)

    def _logits(self, bare: Outputs, other: Outputs, features: Tensor | None) -> Tensor:
        weight = self.defense.weight
        if self.defense.on == "probabilities":
            share = (1 - weight) * bare.logits.softmax(dim=1) + weight * other.logits.softmax(dim=1)
            return (share + TINY).log()
        if self.defense.on == "features" and features is not None and hasattr(self.model, "logits"):
            classify = cast(EmbeddingPipeline, self.model).logits
            assert other.features is not None
            return classify(features) + weight * (other.logits - classify(other.features))
        return (1 - weight) * bare.logits + weight * other.logits
