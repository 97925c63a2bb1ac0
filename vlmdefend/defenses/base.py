"""The defense contract: what is deployed, and what an adaptive attacker differentiates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import fields
from typing import Any, ClassVar, Literal, NamedTuple, cast

from torch import Tensor

from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng
from vlmdefend.types import EmbeddingPipeline, Outputs, Pipeline

Paradigm = Literal["none", "training-time", "test-time adaptation", "training-free"]
RandomTransform = Callable[[Tensor, ImageRng], Tensor]  # (B, 3, H, W) and B streams -> (B, 3, H', W')


class Recipe(NamedTuple):
    """How an adaptive attacker attacks the defense: surrogates, draws, detector weights."""

    text: str  # one line for `list` and the report: what is unrolled, replaced (BPDA), averaged (EOT)
    samples: int = 1  # EOT: draws per gradient
    detector_weights: tuple[float, ...] = ()  # weights of the detector term that are tried, best per image
    surrogates: int = 1  # how many surrogates are tried, best per image
    bare: bool = False  # what fools the bare model is tried too: where surrogates may all mislead


class Defense(ABC):
    """One defense. A subclass is a frozen, keyword-only dataclass: its fields are its configuration and its repr.

    Class attributes: ``name`` (the file's name), ``paradigm``, ``summary`` and ``citation`` (one line each),
    ``stochastic`` (its outputs are drawn anew at every call), ``neutral`` (options at which it does nothing, if there
    are such: a test holds it to that), ``changes`` (what of image, embedding, prompt or weights it changes),
    ``rejects`` (an image of high detector score is turned away: scored as accuracy against rejection, see
    evaluation/statistics/rejection.py), ``certifies`` (its outputs have a certified radius), ``follows_gradient`` (it
    needs the model's gradient at the image itself), and ``recipe``, how it is attacked adaptively: a defense without
    one cannot be defined. What papers report and what was measured is data: ``vlmdefend/published/defenses/NAME.yaml``.

    Determinism, which contract tests hold every defense to: the same seed and the same image, in its place in a batch
    of the same size, give the same prediction, whatever the other images of the batch are. A batch of another size may
    change the last bits of a float (matrix products are blocked differently, and differently on each processor), and a
    method that takes sign steps may amplify them into another prediction. The plan of batches is therefore part of a
    cell, and a resumed run repeats it.
    """

    name: ClassVar[str]
    paradigm: ClassVar[Paradigm]
    summary: ClassVar[str]
    citation: ClassVar[str]
    changes: ClassVar[str] = "image"
    rejects: ClassVar[bool] = False
    certifies: ClassVar[bool] = False
    follows_gradient: ClassVar[bool] = False
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
        """Returns what is deployed and scored: pixels in [0, 1] to outputs, with the defense around ``model``."""

    def surrogate(self, model: Pipeline) -> Pipeline:
        """Returns what an adaptive attacker differentiates; the deployed pipeline, unless autograd cannot see all of
        it.
        """
        return self.wrap(model)

    def surrogates(self, model: Pipeline) -> tuple[Pipeline, ...]:
        """All surrogates that an adaptive attacker tries, ``recipe.surrogates`` in number, :meth:`surrogate` first.

        One surrogate may mislead where another does not: what is scored is the best finding per image.
        """
        return (self.surrogate(model),)

    @property
    def inner(self) -> tuple[Defense, ...]:
        """The defenses that this one is made of."""
        return ()

    @property
    def adaptive_equals_whitebox(self) -> bool:
        """True if knowing the defense adds nothing to plain autograd: no surrogate, no draws, no detector."""
        return (
            type(self).surrogate is Defense.surrogate
            and self.recipe.surrogates == 1
            and not self.stochastic
            and self.recipe.samples == 1
            and not self.recipe.detector_weights
            and not self.recipe.bare
        )

    def spec(self) -> dict[str, Any]:
        """The configuration, as recorded with each result."""
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]


def embedding_pipeline(model: Pipeline, defense: str) -> EmbeddingPipeline:
    """Returns ``model`` as a pipeline whose image features can be changed before the comparison with the classes.

    Raises:
        UserError: it gives logits only.
    """
    if getattr(model, "text_features", None) is None or getattr(model, "logits", None) is None:
        raise UserError(
            f"defense {defense} changes the image embedding, but {type(model).__name__} gives logits only; use it "
            "around a CLIP-like model with `text_features` and `logits(features)`."
        )
    return cast(EmbeddingPipeline, model)


def features_of(outputs: Outputs) -> Tensor:
    """Returns (B, D) image features, which a pipeline that passed :func:`embedding_pipeline` has."""
    assert outputs.features is not None
    return outputs.features


class ChangedImage:
    """A model behind a change of its input; its other attributes are passed through.

    That is what lets a defense of embeddings or prompts go around a defense of images.
    """

    KEPT: ClassVar[frozenset[str]] = frozenset(("logits", "text_features", "blank_features", "std", "text_side"))

    def __init__(self, model: Pipeline, *, stochastic: bool = False) -> None:
        self.model = model
        self.num_classes = model.num_classes
        self.stochastic = stochastic or model.stochastic

    def __getattr__(self, name: str) -> Any:
        """Returns attributes of the model that do not depend on the image."""
        if name in self.KEPT:
            return getattr(self.model, name)
        raise AttributeError(f"{type(self).__name__} has no {name}")


class TransformedInput(ChangedImage):
    """A model behind a transform of its input."""

    def __init__(self, model: Pipeline, transform: RandomTransform, *, stochastic: bool = False) -> None:
        super().__init__(model, stochastic=stochastic)
        self.transform = transform

    def __call__(self, images: Tensor, rng: ImageRng) -> Outputs:
        """Transforms the images, then predicts."""
        return self.model(self.transform(images, rng), rng)
