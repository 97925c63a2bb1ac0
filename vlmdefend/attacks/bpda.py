"""BPDA: a forward pass that autograd cannot see, with the gradient of a surrogate (Athalye et al. 2018, section 4.1).

EOT, the other half of an adaptive attack, is the ``samples`` of a :class:`~vlmdefend.attacks.view.View`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlmdefend.rng import ImageRng
from vlmdefend.types import Outputs, Pipeline

Transform = Callable[[Tensor], Tensor]


class _Replace(torch.autograd.Function):
    """The values of one tensor, the gradient of another."""

    @staticmethod
    def forward(ctx: Any, surrogate: Tensor, exact: Tensor) -> Tensor:
        return exact.view_as(exact)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def bpda(exact: Transform, surrogate: Transform | None = None) -> Transform:
    """Returns a transform with the values of ``exact``, to the bit, and the gradient of ``surrogate`` (default:
    identity).

    ``exact`` runs without autograd, so it may leave torch altogether.
    """

    def transform(images: Tensor) -> Tensor:
        smooth = images if surrogate is None else surrogate(images)
        replaced: Tensor = _Replace.apply(smooth, exact(images.detach()))  # type: ignore[no-untyped-call]
        return replaced

    return transform


class Bpda:
    """A pipeline with the outputs of ``deployed``, to the bit, and the gradient of ``surrogate``.

    Both are shown the same random draws, if they draw the same. Outputs that only one of them has are left out.
    """

    def __init__(self, deployed: Pipeline, surrogate: Pipeline) -> None:
        self.deployed, self.surrogate = deployed, surrogate
        self.num_classes = deployed.num_classes
        self.stochastic = deployed.stochastic or surrogate.stochastic

    def __call__(self, images: Tensor, rng: ImageRng) -> Outputs:
        """Predicts with the deployed pipeline; the surrogate runs only where a gradient is needed."""
        if not (torch.is_grad_enabled() and images.requires_grad):
            return self.deployed(images, rng)
        smooth = self.surrogate(images, copy.deepcopy(rng))  # the deployed pipeline advances the streams
        with torch.no_grad():
            exact = self.deployed(images.detach(), rng)
        logits = _replaced(smooth.logits, exact.logits)
        assert logits is not None
        return Outputs(
            logits,
            _replaced(smooth.features, exact.features),
            _replaced(smooth.detector_score, exact.detector_score),
        )


def _replaced(smooth: Tensor | None, exact: Tensor | None) -> Tensor | None:
    if smooth is None or exact is None:
        return None
    replaced: Tensor = _Replace.apply(smooth, exact)  # type: ignore[no-untyped-call]
    return replaced
