"""The view of a pipeline that an attack receives, and the count of its queries."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from vlmdefend.attacks.criterion import Criterion
from vlmdefend.attacks.losses import Loss
from vlmdefend.rng import ImageRng
from vlmdefend.types import Outputs, Pipeline

if TYPE_CHECKING:
    from vlmdefend.models.zero_shot.text_side import TextSide


class Gradient(NamedTuple):
    """The result of one gradient query."""

    logits: Tensor  # (B, C) at the images; the mean over the samples of a random pipeline
    loss: Tensor  # (B,)
    pixels: Tensor  # (B, ...) gradient of the loss's sum, the caller's to overwrite


@dataclass
class QueryCount:
    """Forwards, backwards and gradient statistics of an attack, per image."""

    forwards: Tensor  # (N,) int64
    backwards: Tensor  # (N,) int64
    gradient_values: int = 0
    outside: int = 0  # images that an attack, or one inside of it, returned outside the budget
    # pixel gradients that are zero or not finite
    zero_gradients: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))


class View:
    """Gives an attack logits, features and gradients of a pipeline for B images, and counts the queries.

    Args:
        pipeline: pixels in [0, 1] to outputs.
        rng: one stream per image, for a random pipeline's draws and the attack's own.
        width: how many images go through the pipeline at once.
        samples: draws per query of a random pipeline; logits and gradients are means over them (EOT, Athalye et
            al. 2018).
        stop: an image that is fooled on the view may leave the attack. False where fooling the view proves
            nothing: a transfer attack, or a pipeline that draws anew when it is scored.
        detector_weight: what the loss gains per unit of quiet in the pipeline's detector; infinite: a fooled image
            climbs the quiet alone, any other the loss alone (selective descent, Bryniarski et al. 2022, section 3.1).
        labels: (B,) of an attacker for whom a finding is better the quieter the detector is about it: the logits that
            it is shown of a fooled image have the margin of :func:`quiet_margin`, so that the best of all iterates is
            the quietest that fools. The loss and its gradient are of the pipeline's own logits.
        model: the model that the pipeline is built around, whose prompts an attack may change; None: the pipeline.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        rng: ImageRng,
        *,
        width: int = 64,
        samples: int = 1,
        stop: bool = True,
        detector_weight: float = 0.0,
        labels: Tensor | None = None,
        model: Pipeline | None = None,
    ) -> None:
        self.pipeline, self.rng = pipeline, rng
        self._model = pipeline if model is None else model
        self.width, self.samples, self.stop, self.detector_weight = width, samples, stop, detector_weight
        self.labels = labels
        self._draws = rng.child("pipeline")
        self._at = torch.arange(len(rng))  # places in the queries
        zeros = torch.zeros(len(rng), dtype=torch.int64)
        self.queries = QueryCount(zeros, zeros.clone())

    @property
    def num_classes(self) -> int:
        """C, the number of logits."""
        return self.pipeline.num_classes

    @property
    def stochastic(self) -> bool:
        """True if two queries of the same images may differ."""
        return self.pipeline.stochastic

    @property
    def text_side(self) -> TextSide | None:
        """The prompts of the model, if its text tower can be reached; else None."""
        side: TextSide | None = getattr(self._model, "text_side", None)
        return side

    def __len__(self) -> int:
        return len(self._at)

    def select(self, index: Tensor) -> View:
        """Returns the view of some of the images, with the same query count and random streams."""
        part = View.__new__(View)
        part.__dict__.update(self.__dict__)
        part.rng, part._draws, part._at = self.rng.select(index), self._draws.select(index), self._at[index]
        part.labels = None if self.labels is None else self.labels[index]
        return part

    def __call__(self, images: Tensor) -> Tensor:
        """Returns (B, C) logits of (B, ...) images, without gradient, ``width`` images at a time."""
        return self.outputs(images).logits

    def outputs(self, images: Tensor) -> Outputs:
        """Returns logits and features of (B, ...) images, without gradient, ``width`` images at a time."""
        parts = []
        for chunk in chunks(len(self), self.width):
            part = self.select(chunk)
            with torch.no_grad():
                parts.append(part._mean_outputs(images[chunk]))
            part._count(backwards=0)
        features = [p.features for p in parts if p.features is not None]
        return Outputs(
            torch.cat([p.logits.float() for p in parts]), torch.cat(features) if len(features) == len(parts) else None
        )

    def gradient(
        self, images: Tensor, criterion: Criterion, loss: Loss, transform: Callable[[Tensor], Tensor] | None = None
    ) -> Gradient:
        """Returns logits, loss and the gradient with respect to the pixels; no other gradient is accumulated.

        Where autograd finds no path from the loss to the pixels (a defense that cuts it), the gradient is zero.

        Args:
            transform: what the pipeline sees instead of the images, differentiable; logits and loss are then those of
                the transformed images.
        """
        total, values, logits, scores = None, None, None, None
        for _ in range(self.samples):
            with torch.enable_grad():
                pixels = images.detach().requires_grad_(True)
                outputs = self.pipeline(pixels if transform is None else transform(pixels), self._draws)
                value = self._with_quiet(loss(outputs, criterion), outputs, criterion)
                objective = value.sum()
            found = torch.autograd.grad(objective, pixels, allow_unused=True)[0] if objective.requires_grad else None
            found = torch.zeros_like(images) if found is None else found
            total = found if total is None else total.add_(found)
            values = value.detach() if values is None else values + value.detach()
            found_logits = outputs.logits.detach().float()
            logits = found_logits if logits is None else logits + found_logits
            scores = _plus(scores, outputs.detector_score)
        assert total is not None
        assert values is not None
        assert logits is not None
        self._count(backwards=1)
        self.queries.gradient_values += total.numel()
        dead = (total == 0) | ~total.isfinite()  # neither moves its pixel
        self.queries.zero_gradients = self.queries.zero_gradients.to(total.device) + dead.sum()
        if self.samples > 1:
            total, values, logits = total.div_(self.samples), values / self.samples, logits / self.samples
        return Gradient(self._ranked(logits, scores), values, total)

    def once(self, images: Tensor, draws: ImageRng) -> Outputs:
        """Runs one query with the caller's draws and its graph, for gradients of other inputs than pixels."""
        self.queries.forwards[self._at] += 1
        return self.pipeline(images, draws)

    def logits(self, images: Tensor) -> Tensor:
        """Returns (n, C) logits of (n, ...) images with a graph, for external code (attacks/external.py).

        Such code does not tell which of the view's images it queries, so the queries are counted in equal parts,
        rounded up, and a random pipeline draws from the first n streams, over again where n is larger.
        """
        places = torch.arange(len(images)) % len(self)
        logits = torch.stack([self.pipeline(images, self._draws.select(places)).logits for _ in range(self.samples)])
        self.queries.forwards[self._at] += -(-len(images) * self.samples // len(self))
        return logits.mean(dim=0) if self.samples > 1 else logits[0]

    def count_backwards(self, gradient: Tensor) -> None:
        """Counts the gradient of (n, ...) images for which :meth:`logits` was called."""
        self.queries.backwards[self._at] += -(-len(gradient) * self.samples // len(self))
        self.queries.gradient_values += gradient.numel()
        dead = (gradient == 0) | ~gradient.isfinite()
        self.queries.zero_gradients = self.queries.zero_gradients.to(gradient.device) + dead.sum()

    def _mean_outputs(self, images: Tensor) -> Outputs:
        first = self.pipeline(images, self._draws)
        logits, features, scores = first.logits, first.features, first.detector_score
        for _ in range(self.samples - 1):
            more = self.pipeline(images, self._draws)
            logits = logits + more.logits
            features = None if features is None or more.features is None else features + more.features
            scores = _plus(scores, more.detector_score)
        if self.samples > 1:
            logits, features = logits / self.samples, None if features is None else features / self.samples
        return Outputs(self._ranked(logits, scores), features)

    def _with_quiet(self, values: Tensor, outputs: Outputs, criterion: Criterion) -> Tensor:
        """Returns (B,) losses with the term that lowers the detector's score added."""
        if not self.detector_weight or outputs.detector_score is None:
            return values
        if math.isinf(self.detector_weight):
            return torch.where(criterion.margin(outputs.logits.detach()) > 0, -outputs.detector_score, values)
        return values - self.detector_weight * outputs.detector_score

    def _ranked(self, logits: Tensor, scores: Tensor | None) -> Tensor:
        """Returns (B, C) logits whose margin also counts how low the detector's score is."""
        if self.labels is None or scores is None:
            return logits
        labels = self.labels.to(logits.device)
        margin = Criterion(labels).margin(logits)
        moved = margin - quiet_margin(margin, scores / self.samples)
        return logits.scatter_add(1, labels[:, None], moved.to(logits.dtype)[:, None])

    def _count(self, *, backwards: int) -> None:
        self.queries.forwards[self._at] += self.samples
        self.queries.backwards[self._at] += backwards * self.samples


def quiet_margin(margins: Tensor, scores: Tensor) -> Tensor:
    """Returns (B,) values to rank iterates by: fooling ones first, and among these the lowest detector score."""
    return torch.where(margins > 0, 2.0 - scores.atan(), margins)


def _plus(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    more = None if more is None else more.detach()
    return more if total is None else total if more is None else total + more


def chunks(total: int, width: int) -> Iterator[Tensor]:
    """Yields index tensors over 0..total-1, ``width`` at a time."""
    for first in range(0, total, width):
        yield torch.arange(first, min(first + width, total))


def __getattr__(name: str) -> Any:
    """Names of version 0.1."""
    from vlmdefend.moved import old_member

    return old_member(__name__, name)
