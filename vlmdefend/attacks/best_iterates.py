"""Best iterates of iterative attacks; several runs of one attack, each on the images that are not fooled yet."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from vlmdefend.attacks.active_set import State
from vlmdefend.attacks.criterion import SURE, Criterion
from vlmdefend.attacks.view import View
from vlmdefend.errors import UserError
from vlmdefend.types import Threat, per_image

Run = Callable[[Tensor], tuple[Tensor, Tensor]]  # (N,) indices -> (N, ...) images, (N,) their margins


class AttackPart(NamedTuple):
    """The images, threat, random streams and criterion of the images in the active set, for one step."""

    view: View
    criterion: Criterion
    threat: Threat


def best_of(runs: Iterable[Run], view: View, images: Tensor) -> Tensor:
    """Returns the (B, ...) result of highest margin over ``runs``; with ``view.stop`` a fooled image skips the later
    ones.
    """
    best = images.clone()
    margins = torch.full((len(images),), -torch.inf, device=images.device)
    todo = torch.arange(len(images))
    for number, run in enumerate(runs):
        found, margin = run(todo)
        better = margin > margins[todo] if number else torch.ones_like(margin, dtype=torch.bool)
        best[todo] = torch.where(per_image(better, found), found, best[todo])
        margins[todo] = torch.where(better, margin, margins[todo])
        if view.stop:
            todo = (margins <= SURE).nonzero()[:, 0].cpu()
        if not len(todo):
            break
    return best


class BestIterates:
    """Stores, per image, the best iterate, and last iterates that still need a forward pass to be compared."""

    def __init__(self, images: Tensor) -> None:
        self.images = images.clone()
        self.margins = torch.full((len(images),), -torch.inf, device=images.device)
        self._unseen: list[tuple[Tensor, Tensor]] = []

    def keep_best(self, index: Tensor, images: Tensor, margins: Tensor) -> None:
        """Stores the best iterates of the images ``index`` (on the CPU), which leave the active set."""
        self.images[index] = images
        self.margins[index] = margins

    def keep_last(self, index: Tensor, images: Tensor) -> None:
        """Stores last iterates, whose margin is not known yet; a forward pass in :meth:`finish` gives it."""
        self._unseen.append((index, images))

    def finish(self, view: View, criterion: Criterion) -> tuple[Tensor, Tensor]:
        """Evaluates the last iterates and returns (N, ...) best iterates and (N,) their margins."""
        index = torch.cat([i for i, _ in self._unseen]) if self._unseen else torch.empty(0, dtype=torch.int64)
        if len(index):
            last = torch.cat([x for _, x in self._unseen])
            margins = criterion.select(index).margin(view.select(index)(last))
            better = margins > self.margins[index]
            self.images[index] = torch.where(per_image(better, last), last, self.images[index])
            self.margins[index] = torch.where(better, margins, self.margins[index])
        return self.images, self.margins


def update_rows_(state: State, where: Tensor, **values: Tensor) -> None:
    """Overwrites rows of the state in place, so that image buffers are reused."""
    for name, value in values.items():
        old = state[name]
        torch.where(per_image(where, old), value, old, out=old)


def likely_wrong(logits: Tensor, labels: Tensor, count: int) -> Tensor:
    """Returns the (B, min(count, C - 1)) classes of highest logit other than the label, most likely first."""
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return others.topk(min(count, logits.shape[1] - 1), dim=1).indices


def check_options(name: str, **options: float) -> None:
    """Refuses counts below 1, and a rho that is not between 0 and 1.

    Raises:
        UserError: naming the option.
    """
    for option, value in options.items():
        if option == "rho" and not 0 <= value <= 1:
            raise UserError(f"{name}: rho={value} must lie in [0, 1].")
        if option != "rho" and value < 1:
            raise UserError(f"{name}: {option}={value} must be at least 1.")
