"""The base of attacks that fit one perturbation to a whole set of images."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal, Self

import torch
from torch import Tensor

from vlmdefend.attacks.base import Attack
from vlmdefend.attacks.best_iterates import check_options
from vlmdefend.attacks.criterion import Criterion
from vlmdefend.attacks.losses import LOSSES, NEEDS_REFERENCE
from vlmdefend.attacks.view import View, chunks
from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng
from vlmdefend.types import Threat, per_image


@dataclass(frozen=True, kw_only=True)
class SetLevel(Attack):
    """One perturbation fitted by stochastic gradient ascent over mini-batches, then applied to every image.

    It is fitted to images of the very set that is evaluated, right or wrong, so it is at its strongest there. Only
    the sign (L2: the direction) of the batch's summed gradient counts, and the steps shrink linearly to nothing, for
    the last iterate is the one used. An image whose loss exceeds ``ceiling`` adds nothing: it is lost already, and
    would drown the others. That is the clipped loss of Shafahi et al. 2020; they clip the cross-entropy at 9, which
    here is ``loss=ce:ceiling=9``. Clipped margins left the lowest accuracy on the embedded sets.

    Options of attacks that learn from a set:
        steps: passes over the images: gradients per image.
        images: how many images of the set it learns from.
        batch: images per update.
        ceiling: the loss above which an image adds nothing; none: no limit, as always for loss=feature.
    """

    steps: int = 10
    images: int = 500
    batch: int = 32
    ceiling: float | None = 2.0
    # What was learned; no option, so it is in no spec and two attacks with the same options are equal.
    learned: Tensor | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_options(self.name, steps=self.steps, images=self.images, batch=self.batch)

    @property
    @abstractmethod
    def loss_name(self) -> Literal["ce", "cw", "feature"]:
        """The name of the loss that is maximised, as in attacks/losses.py."""

    @property
    def learns_from(self) -> int:
        """The option ``images``."""
        return self.images

    @property
    def keeps_best(self) -> bool:
        """False: the fitted perturbation is scored on every image."""
        return False

    def fit_budget(self, count: int, samples: int = 1) -> tuple[int, int]:
        """Returns a gradient per image and pass, and a forward where the loss compares with clean outputs."""
        gradients = self.steps * count * samples
        return gradients + (count * samples if self.loss_name in NEEDS_REFERENCE else 0), gradients

    def _with(self, learned: Tensor) -> Self:
        fitted = replace(self)
        object.__setattr__(fitted, "learned", learned)
        return fitted

    def _fitted(self) -> Tensor:
        if self.learned is None:
            raise UserError(
                f"attack {self.name} uses one thing on all images and has not learned it yet; call fit(view, images, "
                "labels, threat) first and attack with what it returns."
            )
        return self.learned

    def _fit_passes(
        self,
        view: View,
        images: Tensor,
        labels: Tensor,
        apply: Callable[[Tensor, Tensor], tuple[Tensor, Callable[[Tensor], Tensor]]],
        update: Callable[[Tensor, float], None],
    ) -> None:
        """Runs all passes over the images.

        Args:
            apply: (indices of images, their pixels) -> the pixels with the thing on them, and a function that turns
                their gradient into each image's gradient for the thing.
            update: given the batch's summed gradient (float64) and the share of the updates that are left, from 1
                down to above 0, changes the thing.
        """
        _check_fit(self.name, images)
        criterion, loss = Criterion(labels), LOSSES[self.loss_name]
        if self.loss_name in NEEDS_REFERENCE:
            criterion = Criterion(labels, reference=view.outputs(images))
        batches = list(_batches(len(images), self.batch, self.steps, own_stream(view, "order")))
        for number, batch in enumerate(batches):
            total: Tensor | None = None
            for chunk in chunks(len(batch), view.width):
                at = batch[chunk]
                pixels, gradient_of = apply(at, images[at])
                query = view.select(at).gradient(pixels, criterion.select(at), loss)
                counts = query.loss.isfinite() & query.pixels.flatten(1).isfinite().all(1)
                if self.ceiling is not None and self.loss_name not in NEEDS_REFERENCE:
                    counts &= query.loss < self.ceiling
                gradient = query.pixels.where(per_image(counts, query.pixels), 0.0)
                found = gradient_of(gradient).double().sum(dim=0)  # float64: the sum hardly depends on the width
                total = found if total is None else total + found
            assert total is not None
            update(total, 1 - number / len(batches))


def own_stream(view: View, purpose: str) -> ImageRng:
    """Returns one random stream for the set rather than one per image."""
    return ImageRng(view.rng.seed, ["the whole set"], f"{view.rng.purpose}/{purpose}")


def _batches(count: int, batch: int, passes: int, rng: ImageRng) -> Iterator[Tensor]:
    for _ in range(passes):
        order = rng.uniform((count,))[0].argsort()
        for chunk in chunks(count, batch):
            yield order[chunk]


def _check_fit(name: str, images: Tensor) -> None:
    if not len(images):
        raise UserError(f"attack {name} has no image to learn from; give at least one that can be read.")


def radius_of(threat: Threat) -> float:
    """Returns the one radius for which the perturbation is fitted."""
    return float(torch.as_tensor(threat.eps).max())
