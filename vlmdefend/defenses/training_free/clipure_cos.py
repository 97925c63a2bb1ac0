"""CLIPure-Cos: turns the image embedding towards the embedding of texts without a class."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from vlmdefend.defenses import DEFENSES
from vlmdefend.defenses.base import Defense, Paradigm, Recipe, embedding_pipeline, features_of
from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng
from vlmdefend.types import Outputs, Pipeline


@DEFENSES.register
@dataclass(frozen=True, kw_only=True)
class ClipureCos(Defense):
    """``steps`` times u <- normalize(u + eta g / ||g||), g = -grad(-cos(u, t)) = t - cos(u, t) u (Zhang et al. 2025).

    u is the unit image embedding, t the mean text embedding of 80 templates without a class ("a photo of a .").
    A step turns u by arctan(eta) towards t and, at the paper's eta of 30 (88 degrees), past it; the next one turns it
    back. **At the paper's setting of 10 steps the output is the input** wherever cos(u, t) > 1 / sqrt(1 + eta^2) =
    0.033, as it is for CLIP. What changes is the gradient: the official code takes g without a graph, so autograd sees
    ten normalisations, each of which shrinks what is not along u to 1/30. What is left of the true gradient, 1e-15 of
    it, drowns in the rounding errors of the part along u, which the first normalisation cancels. With an odd number of
    steps the output is u mirrored, in the plane of u and t, which amounts to one weight on the classes' similarity to
    t: it can change a prediction, but not tell an adversarial image from others.

    Options:
        steps: 10 in the paper.
        eta: step length, 30 in the paper.
        create_graph: g is a function of u, so that autograd sees the true gradient; the official code has False.
        anchor: t is the ``blank`` text embedding, or the mean of the ``classes``' embeddings: for models without a text
            tower, and for those whose images lie further than 88 degrees from the blank text (the embedded ones do).
        norm: ``sample``, or the official code's ``batch``, one norm for the whole batch, with which predictions depend
            on the batch mates (the evaluator flags it).
    """

    name: ClassVar[str] = "clipure_cos"
    paradigm: ClassVar[Paradigm] = "training-free"
    summary: ClassVar[str] = "turns the image embedding towards the blank text embedding"
    citation: ClassVar[str] = "Zhang et al. 2025"
    changes: ClassVar[str] = "embedding"
    neutral: ClassVar[dict[str, Any] | None] = {"steps": 0}
    recipe: ClassVar[Recipe] = Recipe("exact: the inner gradient keeps its graph")
    steps: int = 10
    eta: float = 30.0
    create_graph: bool = False
    anchor: Literal["blank", "classes"] = "blank"
    norm: Literal["sample", "batch"] = "sample"

    def __post_init__(self) -> None:
        if self.steps < 0 or self.eta < 0:
            raise UserError(f"clipure_cos: steps={self.steps} and eta={self.eta} must be zero or more.")

    def wrap(self, model: Pipeline) -> Pipeline:
        """Embeds, purifies, compares with the classes."""
        return _Purified(self, model)

    def surrogate(self, model: Pipeline) -> Pipeline:
        """The same values with the true gradient."""
        return _Purified(replace(self, create_graph=True), model)

    def purify(self, features: Tensor, blank: Tensor) -> Tensor:
        """Purifies (B, D) image features with the (D,) unit blank embedding; returns (B, D) unit features."""
        e = F.normalize(features, dim=1)
        for _ in range(self.steps):
            r = e.norm(dim=1, keepdim=True)  # 1, but the path of most of what autograd sees without the graph of g
            u = e / r
            current = u if self.create_graph else u.detach()
            g = blank - (current @ blank)[:, None] * current  # the cosine's gradient in closed form
            length = g.norm(dim=1, keepdim=True) if self.norm == "sample" else g.norm()
            e = r * F.normalize(u + self.eta * g / length.clamp_min(1e-12), dim=1)
        return e


class _Purified:
    """A model whose image embedding is purified before the comparison with the classes."""

    def __init__(self, defense: ClipureCos, model: Pipeline) -> None:
        self.defense, self.model = defense, embedding_pipeline(model, defense.name)
        self.num_classes, self.stochastic = model.num_classes, model.stochastic
        self._anchor()

    def __call__(self, images: Tensor, rng: ImageRng) -> Outputs:
        """Embed, purify, compare."""
        seen = self.model(images, rng)
        features = self.defense.purify(features_of(seen), self._anchor())
        length = features.norm(dim=1, keepdim=True)  # 1: the official code does not normalise once more
        return Outputs(length * self.model.logits(features), features, seen.detector_score)

    def _anchor(self) -> Tensor:
        """Returns the (D,) unit embedding that images are turned towards."""
        if self.defense.anchor == "classes":
            return F.normalize(self.model.text_features.mean(dim=0), dim=0)
        blank = self.model.blank_features
        if blank is None:
            raise UserError(
                f"defense {self.defense.name} needs the text embedding of blank templates, which this model does not "
                "give; use anchor=classes, or a classifier built by VisionLanguageModel.zero_shot."
            )
        return blank
