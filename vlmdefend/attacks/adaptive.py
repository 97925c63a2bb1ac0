"""BPDA: a forward pass that autograd cannot see, with the gradient of a stand-in (Athalye et al. 2018, section 4.1).

EOT, the other half of an adaptive attack, is the ``samples`` of a :class:`~vlmdefend.attacks.view.View`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Transform = Callable[[Tensor], Tensor]


class _Replace(torch.autograd.Function):
    """The values of one tensor, the gradient of another."""

    @staticmethod
    def forward(ctx: Any, stand_in: Tensor, exact: Tensor) -> Tensor:
        return exact.view_as(exact)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def bpda(exact: Transform, stand_in: Transform | None = None) -> Transform:
    """A transform with the values of ``exact``, to the bit, and the gradient of ``stand_in`` (default: identity).

    ``exact`` runs without autograd, so it may leave torch altogether.
    """

    def transform(images: Tensor) -> Tensor:
        smooth = images if stand_in is None else stand_in(images)
        replaced: Tensor = _Replace.apply(smooth, exact(images.detach()))  # type: ignore[no-untyped-call]
        return replaced

    return transform
