"""The base of counter-attacks: a perturbation found with the model's own gradient and added to the image."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vlmdefend.attacks.bpda import bpda
from vlmdefend.defenses.base import ChangedImage, Defense, features_of
from vlmdefend.rng import ImageRng
from vlmdefend.types import Outputs, Pipeline, Threat, per_image

# What autograd sees of a counter-attack. ``cut``: as published, the perturbation is a constant. ``constant``: the same
# with a differentiable detector, where there is one. ``unrolled``: the perturbation is a function of the image.
Sight = Literal["cut", "constant", "unrolled"]


class Countered(NamedTuple):
    """The changed images of a counter-attack, with its detector's scores."""

    images: Tensor  # (B, 3, H, W)
    detector_score: Tensor | None = None  # (B,) more than zero: taken for adversarial


class Step(NamedTuple):
    """One step of an ascent."""

    values: Tensor  # (B,) of the objective before it
    images: Tensor  # (B, 3, H, W) after it


class CounterAttack(Defense):
    """A defense that moves the image along the model's gradient before the prediction.

    Deployed, as in the official code of all of them, autograd sees the perturbation as a constant. Adaptive attackers
    recompute it at every step and try two surrogates, best per image: that constant (BPDA), and the unrolled
    counter-attack, where second derivatives flow through the inner gradients and signs take the slope of a soft sign.
    They also try what fools the bare model: a counter-attack that makes the model more confident of its prediction
    flattens the loss where it ends, and follows once the image itself is fooled.
    """

    follows_gradient: ClassVar[bool] = True

    @abstractmethod
    def counter(self, model: Pipeline, images: Tensor, rng: ImageRng, sight: Sight) -> Countered:
        """Returns what the model is given in place of (B, 3, H, W) images in [0, 1]; never changes ``images``."""

    def wrap(self, model: Pipeline) -> Pipeline:
        """Counter-attacks, then predicts."""
        return CounterAttacked(self, model, "cut")

    def surrogate(self, model: Pipeline) -> Pipeline:
        """Treats the perturbation as a constant that is recomputed at every call."""
        return CounterAttacked(self, model, "constant")

    def surrogates(self, model: Pipeline) -> tuple[Pipeline, ...]:
        """Returns the constant and the unrolled surrogate."""
        return self.surrogate(model), CounterAttacked(self, model, "unrolled")


class CounterAttacked(ChangedImage):
    """A model behind a counter-attack."""

    def __init__(self, defense: CounterAttack, model: Pipeline, sight: Sight) -> None:
        super().__init__(model, stochastic=defense.stochastic)
        self.defense, self.sight = defense, sight

    def __call__(self, images: Tensor, rng: ImageRng) -> Outputs:
        """Counter-attacks, then predicts."""
        seen = self.defense.counter(self.model, images, rng, self.sight)
        outputs = self.model(seen.images, rng)
        return outputs if seen.detector_score is None else outputs._replace(detector_score=seen.detector_score)


def pixel_gradient(
    objective: Callable[[Tensor], Tensor], images: Tensor, *, unrolled: bool = False
) -> tuple[Tensor, Tensor]:
    """Returns the gradient of the summed objective at (B, ...) images, and its (B,) values.

    Works inside ``no_grad``. ``unrolled``: gradient and values are differentiable functions of the images, if these
    want a gradient; attention then runs in plain products, since the fused kernels have no second derivative.
    """
    unrolled = unrolled and images.requires_grad and torch.is_grad_enabled()
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH) if unrolled else nullcontext():
        at = images.clone() if unrolled else images.detach().clone().requires_grad_(True)
        values = objective(at)
        (gradient,) = torch.autograd.grad(values.sum(), at, create_graph=unrolled)
    return gradient, values if unrolled else values.detach()


def sign_ascent(
    objective: Callable[[Tensor], Tensor],
    first: Tensor,
    around: Tensor,
    *,
    eps: float,
    alpha: float,
    steps: int,
    unrolled: bool,
) -> Iterator[Step]:
    """Takes sign steps from ``first`` up the objective, inside [0, 1] and the L-infinity ball around ``around``.

    Args:
        objective: (B, 3, H, W) -> (B,).
        eps: radius of the ball; alpha: step size.
        unrolled: as in :func:`pixel_gradient`.
    """
    ball, moved = Threat("linf", eps), first
    for _ in range(steps):
        gradient, values = pixel_gradient(objective, moved, unrolled=unrolled)
        moved = ball.project(moved + alpha * ascent_sign(gradient), around)
        yield Step(values, moved)


def noisy(images: Tensor, rng: ImageRng, eps: float) -> Tensor:
    """Adds uniform noise of the L-infinity ball's size, inside [0, 1]."""
    noise = rng.uniform(images.shape[1:], -eps, eps).to(images)
    return (images + noise).clamp(0.0, 1.0)


def departure(
    model: Pipeline, images: Tensor, rng: ImageRng, *, graph: bool
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Returns (B, D) features f(x) and the function y -> (B,) ||f(y) - f(x)||^2.

    ``graph``: f(x) may have a gradient.
    """
    with torch.set_grad_enabled(torch.is_grad_enabled() and graph):
        reference = features_of(model(images, rng))
    return reference, lambda others: (features_of(model(others, rng)) - reference).square().sum(dim=1)


def relative(squared_distances: Tensor, reference: Tensor) -> Tensor:
    """Returns (B,) distances divided by the length of the (B, D) reference."""
    share: Tensor = squared_distances.clamp_min(1e-24).sqrt() / reference.norm(dim=1)
    return share


def ascent_sign(gradient: Tensor) -> Tensor:
    """Returns the sign, with the slope of g / (|g| + mean |g|) for an attacker who unrolls it."""
    signed: Tensor = _SIGN(gradient)
    return signed


def shown(images: Tensor, moved: Tensor, sight: Sight) -> Tensor:
    """Returns ``moved`` as the attacker differentiates it: a constant step, or the unrolled ascent."""
    return moved if sight == "unrolled" else images + (moved - images).detach()


def _soft_sign(gradient: Tensor) -> Tensor:
    scale = gradient.detach().abs().flatten(1).mean(dim=1).clamp_min(1e-30)
    return gradient / (gradient.abs() + per_image(scale, gradient))


_SIGN = bpda(torch.sign, _soft_sign)
