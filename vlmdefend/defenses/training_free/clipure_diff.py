"""CLIPure-Diff: moves the image embedding to where a diffusion model of embeddings gives a higher likelihood."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vlmdefend.attacks.bpda import bpda
from vlmdefend.defenses import DEFENSES
from vlmdefend.defenses.base import Defense, Paradigm, Recipe, embedding_pipeline, features_of
from vlmdefend.defenses.training_free._diffusion_prior import (
    DiffusionPrior,
    TextCondition,
    condition_of,
    denoising_loss,
    load_prior,
)
from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng
from vlmdefend.types import Outputs, Pipeline

# What autograd sees. ``cut``: as published, the gradient of the prior's loss is a constant. ``unrolled``: it is a
# function of the embedding. ``identity``: the purified embedding has the slope of the embedding itself.
Sight = Literal["cut", "unrolled", "identity"]


@DEFENSES.register
@dataclass(frozen=True, kw_only=True)
class ClipureDiff(Defense):
    """``steps`` times u <- normalize(u - eta g / ||g||), g the gradient of a denoising loss (Zhang et al. 2025).

    u is the unit image embedding, the loss that of a diffusion prior at one random step of the diffusion, between
    ``earliest`` and ``latest``, with fresh noise each time, given the mean text embedding of 80 templates that name no
    class. As the official code, but the step is drawn for each image, not for the batch, and g has unit length for each
    image.

    The paper's prior (DALL-E 2's, as LAION trained it for CLIP ViT-L/14) is a pickled file of gigabytes and does not
    come with this package. ``prior=gaussian`` is what stands in: embeddings as if normal around the text's, for which
    the loss has a closed form. Its steps go towards the text but for the noise: CLIPure-Cos with noise, and no evidence
    about the paper's. In the late steps of the diffusion the noise is most of what any prior sees.

    Deployed, as in the official code, autograd sees g as a constant. The adaptive attacker tries the true gradient,
    through second derivatives of the prior, the slope of the identity, and what fools the bare model.

    Options:
        prior: gaussian; a folder that diffusers' PriorTransformer wrote; or, in brackets because of its colons,
            ``[python:MODULE:FUNCTION]``, a function that takes the device and returns a prior (see _diffusion_prior).
        steps: 10 in the paper.
        eta: step length, 30 in the paper: 88 degrees.
        earliest, latest: steps of the diffusion, of 1000.
        anchor: the text that the prior is given is the ``blank`` one, or the mean of the ``classes``' embeddings (see
            clipure_cos); what a prior reads token by token stays the blank one.
    """

    name: ClassVar[str] = "clipure_diff"
    paradigm: ClassVar[Paradigm] = "training-free"
    summary: ClassVar[str] = "moves the image embedding down a diffusion prior's loss"
    citation: ClassVar[str] = "Zhang et al. 2025"
    changes: ClassVar[str] = "embedding"
    stochastic: ClassVar[bool] = True
    neutral: ClassVar[dict[str, Any] | None] = {"steps": 0}
    recipe: ClassVar[Recipe] = Recipe(
        "inner gradient keeps its graph, or BPDA with the identity, or what fools the bare model, best per image; EOT: "
        "mean gradient over 4 draws of steps and noise",
        samples=4,
        surrogates=2,
        bare=True,
    )
    prior: str = "gaussian"
    steps: int = 10
    eta: float = 30.0
    earliest: int = 900
    latest: int = 999
    anchor: Literal["blank", "classes"] = "blank"

    def __post_init__(self) -> None:
        if self.steps < 0 or self.eta < 0:
            raise UserError(f"clipure_diff: steps={self.steps} and eta={self.eta} must be zero or more.")
        if not 0 <= self.earliest <= self.latest:
            raise UserError(f"clipure_diff: earliest={self.earliest} must lie between 0 and latest={self.latest}.")

    def wrap(self, model: Pipeline) -> Pipeline:
        """Embeds, purifies, compares with the classes."""
        return _Purified(self, model, "cut")

    def surrogate(self, model: Pipeline) -> Pipeline:
        """The same values with the true gradient."""
        return _Purified(self, model, "unrolled")

    def surrogates(self, model: Pipeline) -> tuple[Pipeline, ...]:
        """Returns two surrogates: the true gradient, and that of the identity."""
        return self.surrogate(model), _Purified(self, model, "identity")

    def purify(
        self,
        features: Tensor,
        prior: DiffusionPrior,
        condition: TextCondition,
        rng: ImageRng,
        *,
        unrolled: bool = False,
    ) -> Tensor:
        """Purifies (B, D) image features; returns (B, D) of the same lengths."""
        length = features.norm(dim=1, keepdim=True)
        u = features / length
        for _ in range(self.steps):
            time = rng.integers((1,), self.earliest, self.latest + 1)[:, 0].to(u.device)
            noise = rng.normal(features.shape[1:]).to(u)
            through = unrolled and u.requires_grad and torch.is_grad_enabled()
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH) if through else nullcontext():
                at = u if through else u.detach().requires_grad_(True)
                size = length if through else length.detach()
                loss = denoising_loss(prior, size * at, time, noise, condition).sum()
                (gradient,) = torch.autograd.grad(loss, at, create_graph=through)
            u = F.normalize(u - self.eta * F.normalize(gradient, dim=1), dim=1)
        purified: Tensor = length * u
        return purified


class _Purified:
    """A model whose image embedding is purified before the comparison with the classes."""

    def __init__(self, defense: ClipureDiff, model: Pipeline, sight: Sight) -> None:
        self.defense, self.model, self.sight = defense, embedding_pipeline(model, defense.name), sight
        self.num_classes, self.stochastic = model.num_classes, True
        text = defense.prior[1:-1] if defense.prior.startswith("[") else defense.prior
        self.prior = load_prior(text, self.model.text_features.device)
        if defense.latest >= len(self.prior.signal):
            raise UserError(
                f"clipure_diff: latest={defense.latest}, but the prior has {len(self.prior.signal)} steps; choose "
                "earliest and latest below that."
            )
        self.condition = condition_of(self.model, states=self.prior.reads_states, classes=defense.anchor == "classes")

    def __call__(self, images: Tensor, rng: ImageRng) -> Outputs:
        """Embed, purify, compare."""
        seen = self.model(images, rng)
        features = features_of(seen)
        if self.sight == "identity":
            purified = bpda(lambda raw: self._purified(raw, rng))(features)
        else:
            purified = self._purified(features, rng)
        return Outputs(self.model.logits(purified), purified, seen.detector_score)

    def _purified(self, features: Tensor, rng: ImageRng) -> Tensor:
        return self.defense.purify(features, self.prior, self.condition, rng, unrolled=self.sight == "unrolled")
