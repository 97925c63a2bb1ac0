"""What iterative attacks share: several runs, each on the images that the earlier ones did not fool, best per image."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from vlmdefend.attacks.active_set import State
from vlmdefend.attacks.criterion import SURE, Goal
from vlmdefend.attacks.view import View
from vlmdefend.errors import UserError
from vlmdefend.types import Threat, per_image

Run = Callable[[Tensor], tuple[Tensor, Tensor]]  # (N,) indices -> (N, ...) images, (N,) their margins


class Part(NamedTuple):
    """What a step needs of the images in the slots."""

    view: View
    goal: Goal
    threat: Threat


def best_of(runs: Iterable[Run], view: View, images: Tensor) -> Tensor:
    """(B, ...) the result of highest margin over ``runs``; with ``view.stop`` a fooled image skips the later ones."""
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


class Harvest:
    """Collects what leaves the slots: N best iterates, and last iterates that no gradient query has looked at."""

    def __init__(self, images: Tensor) -> None:
        self.images = images.clone()
        self.margins = torch.full((len(images),), -torch.inf, device=images.device)
        self._unseen: list[tuple[Tensor, Tensor]] = []

    def take(self, index: Tensor, images: Tensor, margins: Tensor) -> None:
        """Keep the best iterates of the images ``index`` (on the CPU), which leave."""
        self.images[index] = images
        self.margins[index] = margins

    def look_later(self, index: Tensor, images: Tensor) -> None:
        """Remember last iterates; they need a forward, not a gradient."""
        self._unseen.append((index, images))

    def finish(self, view: View, goal: Goal) -> tuple[Tensor, Tensor]:
        """Look at the last iterates; (N, ...) best iterates and (N,) their margins."""
        index = torch.cat([i for i, _ in self._unseen]) if self._unseen else torch.empty(0, dtype=torch.int64)
        if len(index):
            last = torch.cat([x for _, x in self._unseen])
            margins = goal.select(index).margin(view.select(index)(last))
            better = margins > self.margins[index]
            self.images[index] = torch.where(per_image(better, last), last, self.images[index])
            self.margins[index] = torch.where(better, margins, self.margins[index])
        return self.images, self.margins


def keep_(state: State, where: Tensor, **values: Tensor) -> None:
    """Overwrite rows of the state; in place, so that image buffers are reused."""
    for name, value in values.items():
        old = state[name]
        torch.where(per_image(where, old), value, old, out=old)


def likely_wrong(logits: Tensor, labels: Tensor, count: int) -> Tensor:
    """(B, min(count, C - 1)) the classes of highest logit other than the label, likeliest first."""
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return others.topk(min(count, logits.shape[1] - 1), dim=1).indices


def check_options(name: str, **options: float) -> None:
    """Refuse counts below 1, and a rho that is not a fraction.

    Raises:
        UserError: naming the option.
    """
    for option, value in options.items():
        if option == "rho" and not 0 <= value <= 1:
            raise UserError(f"{name}: rho={value} must lie in [0, 1].")
        if option != "rho" and value < 1:
            raise UserError(f"{name}: {option}={value} must be at least 1.")
