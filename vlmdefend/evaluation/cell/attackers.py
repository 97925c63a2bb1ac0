"""The three attackers (transfer, white-box, adaptive): the pipeline each may query, and the merge of its variants."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from vlmdefend.attacks.base import Attack
from vlmdefend.attacks.criterion import SURE, Criterion
from vlmdefend.attacks.view import View, chunks, quiet_margin
from vlmdefend.defenses.base import Defense
from vlmdefend.rng import ImageRng
from vlmdefend.types import Attacker, Outputs, Pipeline, Threat, per_image

BARE = -1
COMPARED_DRAWS = 4  # draws of a random pipeline by which the results of several variants are compared, the same for all


class CraftedBatch(NamedTuple):
    """Adversarial images of a batch, with queries spent and gradient statistics."""

    images: Tensor  # (B, 3, H, W)
    steps: Tensor  # (B,) gradient evaluations
    gradient_values: int
    zero_gradients: int
    outside: int
    finite: bool  # whether every logit that the attacker received was finite
    fooled: Tensor  # (B,) bool, by the attacker's margin

    def with_again(self, at: Tensor, again: CraftedBatch) -> CraftedBatch:
        """Replaces the images ``at`` by those of a second attack, and adds up the cost of both."""
        images, steps, fooled = self.images.clone(), self.steps.clone(), self.fooled.clone()
        images[at], fooled[at] = again.images, again.fooled
        steps[at.cpu()] += again.steps
        return CraftedBatch(
            images,
            steps,
            self.gradient_values + again.gradient_values,
            self.zero_gradients + again.zero_gradients,
            self.outside + again.outside,
            self.finite and again.finite,
            fooled,
        )


class Fitted(NamedTuple):
    """The fitted attack of each variant, with the gradient statistics of the fit."""

    attacks: dict[Variant, Attack]
    gradient_values: int
    zero_gradients: int
    finite: bool  # whether every logit that the attacker received was finite


class Variant(NamedTuple):
    """One choice of an adaptive attacker: the surrogate to differentiate, and the weight of the detector term."""

    surrogate: int = 0  # BARE: the model without the defense; its margins are measured on the first surrogate
    detector_weight: float = 0.0

    def purpose(self, attacker: Attacker) -> str:
        """Returns the name from which the random streams of this variant are derived."""
        surrogate = "bare" if self.surrogate == BARE else f"surrogate {self.surrogate}" if self.surrogate else ""
        detector = f"detector {self.detector_weight}" if self.detector_weight else ""
        return " ".join(filter(None, (surrogate, detector))) or attacker


class WatchedView:
    """Wraps a pipeline and records whether all its logits were finite; if not, the attack is void."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.num_classes, self.stochastic = pipeline.num_classes, pipeline.stochastic
        self._finite: Tensor | None = None  # stays on the device: reading it at every query would synchronize

    def __call__(self, images: Tensor, rng: ImageRng) -> Outputs:
        """Predicts, and checks that the logits are finite."""
        outputs = self.pipeline(images, rng)
        finite = outputs.logits.detach().isfinite().all()
        # In place: a CUDA graph (attacks/_graph.py) replays writes to this tensor, but would not see a new one.
        self._finite = finite if self._finite is None else self._finite.logical_and_(finite)
        return outputs

    @property
    def finite(self) -> bool:
        """True if all logits so far were finite."""
        return self._finite is None or bool(self._finite)


def view_of(
    attacker: Attacker,
    defense: Defense,
    model: Pipeline,
    rng: ImageRng,
    width: int,
    variant: Variant = Variant(),  # noqa: B008 (a tuple)
    labels: Tensor | None = None,
) -> View:
    """Returns the pipeline that ``attacker`` may query.

    ``transfer`` queries the bare model, ``whitebox`` the deployed pipeline as autograd differentiates it, ``adaptive``
    the defense's surrogates with their number of draws. An image may stop early only where fooling the view means
    fooling the deployed pipeline: not for transfer, and not for a pipeline that draws new random numbers when it is
    scored. Nor where the defense rejects images: there an adaptive attacker continues to the iterate with the lowest
    detector score among those that fool the classifier; it needs the labels for that.
    """
    if attacker == "transfer" or variant.surrogate == BARE:
        return View(WatchedView(model), rng, width=width, stop=False, model=model)
    if attacker == "whitebox":
        return View(WatchedView(defense.wrap(model)), rng, width=width, stop=not defense.stochastic, model=model)
    return View(
        WatchedView(defense.surrogates(model)[variant.surrogate]),
        rng,
        width=width,
        samples=defense.recipe.samples,
        stop=not defense.stochastic and not defense.rejects,
        detector_weight=variant.detector_weight,
        labels=labels if defense.rejects else None,
        model=model,
    )


def variants(attacker: Attacker, defense: Defense) -> tuple[Variant, ...]:
    """Returns every surrogate with every detector weight; a single variant for attackers that are not adaptive."""
    if attacker != "adaptive":
        return (Variant(),)
    weights = defense.recipe.detector_weights or (0.0,)
    known = tuple(Variant(number, weight) for number in range(defense.recipe.surrogates) for weight in weights)
    return (*known, Variant(BARE)) if defense.recipe.bare else known


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
) -> Fitted:
    """Returns the attack of each variant, fitted to N images of the set.

    Prompts are the same for all images, so all variants use the prompts of the variant with the strongest ones.
    """
    fitted = {}
    values = zeros = 0
    finite = True
    for variant in variants(attacker, defense):
        view = view_of(attacker, defense, model, rng.child(variant.purpose(attacker)), width, variant, labels)
        fitted[variant] = attack.fit(view, images, labels, threat)
        values += view.queries.gradient_values
        zeros += int(view.queries.zero_gradients)
        finite = finite and (not isinstance(view.pipeline, WatchedView) or view.pipeline.finite)
    if attack.changes_prompts and len(fitted) > 1:
        fitted = _best_prompts(fitted, defense, model, images, labels, rng, width)
    return Fitted(fitted, values, zeros, finite)


def _best_prompts(
    fitted: Mapping[Variant, Attack],
    defense: Defense,
    model: Pipeline,
    images: Tensor,
    labels: Tensor,
    rng: ImageRng,
    width: int,
) -> dict[Variant, Attack]:
    """Returns every variant with the attack whose prompts leave the fewest images right; the first at a tie."""
    right = {}
    for variant, attack in fitted.items():
        view = View(defense.wrap(model), rng.child("deployed"), width=width, model=model)
        with attack.conditions(view.text_side):
            right[variant] = int((view(images).argmax(dim=1) == labels).sum())
    best = min(right, key=lambda variant: right[variant])
    return dict.fromkeys(fitted, fitted[best])


def craft(
    attacker: Attacker,
    attacks: Mapping[Variant, Attack],
    defense: Defense,
    model: Pipeline,
    images: Tensor,
    labels: Tensor,
    threat: Threat,
    rng: ImageRng,
    width: int,
    *,
    stop: bool = True,
) -> CraftedBatch:
    """Attacks B images; an adaptive attacker runs every variant and keeps the best per image.

    ``attacks`` holds the attack of each variant, as :func:`fit` returns it. Later variants skip an image that stopped
    early because it was fooled.

    ``stop=False``: no image stops early, because one that fools the view may not fool the deployed pipeline.
    """
    best, margins = images.clone(), torch.full((len(images),), -torch.inf, device=images.device)
    steps = torch.zeros(len(images), dtype=torch.int64)
    values = zeros = outside = 0
    finite = True
    todo = torch.arange(len(images))
    for variant, attack in attacks.items():
        streams = rng.child(variant.purpose(attacker)).select(todo)
        view = view_of(attacker, defense, model, streams, width, variant, labels[todo])
        view.stop = view.stop and stop
        found = attack(view, images[todo], labels[todo], threat.select(todo))
        margin = found.margin
        # the name "judge" of the random stream must stay: another name would change the results
        reference = view_of(attacker, defense, model, rng.child("judge").select(todo), width)
        if defense.stochastic:
            reference.samples = max(reference.samples, COMPARED_DRAWS)
        with attack.conditions(reference.text_side if attack.changes_prompts else None):
            if variant.surrogate == BARE or (defense.stochastic and len(attacks) > 1):
                margin = Criterion(labels[todo]).margin(reference(found.images))
            scores = _detector_scores(defense, model, found.images, reference.rng, width) if defense.rejects else None
        if scores is not None:
            margin = quiet_margin(margin, scores)
        better = margin > margins[todo]
        best[todo] = torch.where(per_image(better, found.images), found.images, best[todo])
        margins[todo] = torch.where(better, margin, margins[todo])
        steps[todo] += found.steps
        values += view.queries.gradient_values
        zeros += int(view.queries.zero_gradients)
        outside += found.outside
        finite = finite and all(
            not isinstance(seen.pipeline, WatchedView) or seen.pipeline.finite for seen in (view, reference)
        )
        if view.stop and not defense.rejects:  # with a detector, another variant may reach a lower score
            todo = (margins <= SURE).nonzero()[:, 0].cpu()
        if not len(todo):
            break
    return CraftedBatch(best, steps, values, zeros, outside, finite, margins > 0)


def _detector_scores(defense: Defense, model: Pipeline, images: Tensor, rng: ImageRng, width: int) -> Tensor:
    """Returns the (B,) scores of the defended model's detector."""
    deployed, scores = defense.wrap(model), []
    for chunk in chunks(len(images), width):
        with torch.no_grad():
            score = deployed(images[chunk], rng.select(chunk)).detector_score
        assert score is not None
        scores.append(score)
    return torch.cat(scores)
