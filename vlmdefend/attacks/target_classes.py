"""Chooses the target class of a targeted attack."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vlmdefend.attacks.view import View
from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng

Target = Literal["random", "second", "least"] | int


def choose_targets(target: Target, view: View, images: Tensor, labels: Tensor, rng: ImageRng) -> Tensor:
    """Returns (B,) target classes, never the label (a named class that is the label is replaced by the next one).

    Args:
        target: ``random``, ``second`` (the most likely wrong class), ``least`` (likely), or a class index.

    Raises:
        UserError: an index that is no class of the model.
    """
    count = view.num_classes
    if isinstance(target, int):
        if not 0 <= target < count:
            raise UserError(f"target={target}: the model knows classes 0 to {count - 1}.")
        targets = torch.full_like(labels, target)
        return torch.where(targets == labels, (targets + 1) % count, targets)
    if target == "random":
        shift = rng.child("target").integers((1,), 1, count)[:, 0].to(labels.device)
        return (labels + shift) % count
    logits = view(images)
    own = torch.nn.functional.one_hot(labels, count).bool()
    if target == "second":
        return logits.masked_fill(own, -torch.inf).argmax(dim=1)
    return logits.masked_fill(own, torch.inf).argmin(dim=1)
