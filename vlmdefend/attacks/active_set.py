"""The active set: images that are decided leave the batch, and the next ones take their places.

On an undefended model most images are fooled within a few steps; a batch that carries them on spends nearly all its
gradients on decided images. A robust model keeps its batch full to the end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

State = dict[str, Tensor]  # one row per slot
Part = TypeVar("Part")


def run_active_set(
    total: int,
    width: int,
    select: Callable[[Tensor], Part],
    start: Callable[[Tensor], State],
    step: Callable[[Part, Tensor, State], Tensor],
) -> None:
    """Calls ``step`` on at most ``width`` of ``total`` images at a time; an image whose step reports that it is
    finished makes room for the next.

    Args:
        total: the number of images.
        width: the number of slots.
        select: (B,) indices -> what a step needs of these images; called when the slots' images change.
        start: (b,) indices of images that enter -> their state, b rows each.
        step: (part, (B,) indices, state) -> (B,) bool, True for images that leave; it changes the state in place
            and keeps what it wants of those that leave.
    """
    index = torch.arange(min(width, total))
    if not total:
        return
    waiting = len(index)
    state, part = start(index), select(index)
    while len(index):
        done = step(part, index, state).cpu()
        if not done.any():
            continue
        free = done.nonzero()[:, 0]
        entering = torch.arange(waiting, min(waiting + len(free), total))
        waiting += len(entering)
        if len(entering):
            taken = free[: len(entering)]
            index[taken] = entering
            for name, rows in start(entering).items():
                state[name][taken] = rows
        if len(entering) < len(free):
            keep = torch.ones(len(index), dtype=torch.bool)
            keep[free[len(entering) :]] = False
            index = index[keep]
            state = {name: rows[keep] for name, rows in state.items()}
        part = select(index)
