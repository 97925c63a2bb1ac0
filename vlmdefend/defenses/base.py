"""The defense contract: what is deployed, and what an attacker who knows the defense differentiates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import fields
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor

from vlmdefend.rng import ImageRng
from vlmdefend.types import Outputs, Pipeline

Paradigm = Literal["none", "training-time", "test-time adaptation", "training-free"]
RandomTransform = Callable[[Tensor, ImageRng], Tensor]  # (B, 3, H, W) and B streams -> (B, 3, H', W')


class Recipe(NamedTuple):
    """How the defense is attacked by someone who knows it."""

    text: str  # one line for `list` and the report: what is unrolled, replaced (BPDA), averaged (EOT)
    samples: int = 1  # EOT: draws per gradient
    detector_weights: tuple[float, ...] = ()  # weights of the detector term that are tried, best per image


class Defense(ABC):
    """One defense. A subclass is a frozen, keyword-only dataclass: its fields are its configuration and its repr.

    Class attributes: ``name`` (the file's name), ``paradigm``, ``summary`` and ``citation`` (one line each),
    ``stochastic`` (its outputs are drawn anew at every call), ``neutral`` (options at which it does nothing, if there
    are such: a test holds it to that), and ``recipe``: without one a defense cannot be
    defined, for then nobody could tell whether it defends.
    """

    name: ClassVar[str]
    paradigm: ClassVar[Paradigm]
    summary: ClassVar[str]
    citation: ClassVar[str]
    stochastic: ClassVar[bool] = False
    neutral: ClassVar[dict[str, Any] | None] = None
    recipe: ClassVar[Recipe]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__ and not hasattr(cls, "recipe"):
            raise TypeError(
                f"defense {cls.name!r} has no recipe: say how someone who knows it would attack it, "
                "recipe: ClassVar[Recipe] = Recipe('...')"
            )

    @abstractmethod
    def wrap(self, model: Pipeline) -> Pipeline:
        """What is deployed and scored: pixels in [0, 1] to outputs, with the defense around ``model``."""

    def surrogate(self, model: Pipeline) -> Pipeline:
        """What an adaptive attacker differentiates; the deployed pipeline unless autograd cannot see it all."""
        return self.wrap(model)

    @property
    def adaptive_equals_whitebox(self) -> bool:
        """True if knowing the defense adds nothing to plain autograd: no stand-in, no draws, no detector."""
        return (
            type(self).surrogate is Defense.surrogate
            and not self.stochastic
            and self.recipe.samples == 1
            and not self.recipe.detector_weights
        )

    def spec(self) -> dict[str, Any]:
        """The configuration, as recorded with each result."""
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]


class TransformedInput:
    """A model behind a transform of its input."""

    def __init__(self, model: Pipeline, transform: RandomTransform, *, stochastic: bool = False) -> None:
        self.model, self.transform = model, transform
        self.num_classes = model.num_classes
        self.stochastic = stochastic or model.stochastic

    def __call__(self, images: Tensor, rng: ImageRng) -> Outputs:
        """Transform, then predict."""
        return self.model(self.transform(images, rng), rng)
