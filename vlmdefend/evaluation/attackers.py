"""The three attackers: what each may differentiate, and how its findings are merged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from vlmdefend.attacks.base import Attack
from vlmdefend.attacks.view import View
from vlmdefend.defenses.base import Defense
from vlmdefend.evaluation.records import Attacker
from vlmdefend.rng import ImageRng
from vlmdefend.types import Outputs, Pipeline, Threat, per_image


class Crafted(NamedTuple):
    """Adversarial images with what they cost and what the gradients looked like."""

    images: Tensor  # (B, 3, H, W)
    steps: Tensor  # (B,) gradient evaluations
    gradient_values: int
    zero_gradients: int
    outside: int
    finite: bool  # every logit that the attacker was shown


class Watched:
    """A pipeline that remembers whether its logits were ever not finite: an attack blind with them proves nothing."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.num_classes, self.stochastic = pipeline.num_classes, pipeline.stochastic
        self._finite: Tensor | None = None  # on the device: a test at every query would wait for it

    def __call__(self, images: Tensor, rng: ImageRng) -> Outputs:
        """Predict and watch."""
        outputs = self.pipeline(images, rng)
        finite = outputs.logits.detach().isfinite().all()
        self._finite = finite if self._finite is None else self._finite & finite
        return outputs

    @property
    def finite(self) -> bool:
        """True if all logits so far were finite."""
        return self._finite is None or bool(self._finite)


def view_of(
    attacker: Attacker, defense: Defense, model: Pipeline, rng: ImageRng, width: int, detector_weight: float = 0.0
) -> View:
    """What ``attacker`` may query.

    ``transfer`` sees the bare model, ``whitebox`` the deployed pipeline as autograd sees it, ``adaptive`` the
    defense's surrogate with its number of draws. An image may leave early only where fooling the view is fooling
    the deployed pipeline: not for transfer, and not for a pipeline that draws anew when it is scored.
    """
    if attacker == "transfer":
        return View(Watched(model), rng, width=width, stop=False)
    if attacker == "whitebox":
        return View(Watched(defense.wrap(model)), rng, width=width, stop=not defense.stochastic)
    return View(
        Watched(defense.surrogate(model)),
        rng,
        width=width,
        samples=defense.recipe.samples,
        stop=not defense.stochastic,
        detector_weight=detector_weight,
    )


def detector_weights(attacker: Attacker, defense: Defense) -> tuple[float, ...]:
    """The weights of the detector term that are tried; without a detector the one weight 0."""
    return (defense.recipe.detector_weights if attacker == "adaptive" else ()) or (0.0,)


def fit(
    attacker: Attacker,
    attack: Attack,
    defense: Defense,
    model: Pipeline,
    images: Tensor,
    labels: Tensor,
    threat: Threat,
    rng: ImageRng,
    width: int,
) -> dict[float, Attack]:
    """The attack for each weight of the detector term, after it has learned from N images of the set."""
    fitted = {}
    for weight in detector_weights(attacker, defense):
        view = view_of(attacker, defense, model, rng.child(f"detector {weight}"), width, weight)
        fitted[weight] = attack.fit(view, images, labels, threat)
    return fitted


def craft(
    attacker: Attacker,
    attacks: Mapping[float, Attack],
    defense: Defense,
    model: Pipeline,
    images: Tensor,
    labels: Tensor,
    threat: Threat,
    rng: ImageRng,
    width: int,
    *,
    stop: bool = True,
) -> Crafted:
    """Attack B images; an adaptive attacker of a detector tries each weight of the detector term, best per image.

    ``attacks`` holds the attack for each weight, as :func:`fit` returns them.

    ``stop=False``: the view's word that an image is fooled is not the deployed pipeline's.
    """
    best, margins = images.clone(), torch.full((len(images),), -torch.inf, device=images.device)
    steps = torch.zeros(len(images), dtype=torch.int64)
    values = zeros = outside = 0
    finite = True
    for weight, attack in attacks.items():
        view = view_of(attacker, defense, model, rng.child(f"detector {weight}" if weight else attacker), width, weight)
        view.stop = view.stop and stop
        found = attack(view, images, labels, threat)
        better = found.margin > margins
        best = torch.where(per_image(better, best), found.images, best)
        margins = torch.where(better, found.margin, margins)
        steps += found.steps
        values += view.ledger.gradient_values
        zeros += int(view.ledger.zero_gradients)
        outside += found.outside
        finite = finite and (not isinstance(view.pipeline, Watched) or view.pipeline.finite)
    return Crafted(best, steps, values, zeros, outside, finite)
