"""Compares an adaptive attacker's surrogates with the defended model: fooling a surrogate is no success yet."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmdefend.evaluation.cell.attackers import CraftedBatch
from vlmdefend.evaluation.cell.defended_model import DefendedModel, same
from vlmdefend.evaluation.cell.fitted_attacks import FittedAttack
from vlmdefend.rng import ImageRng
from vlmdefend.types import Batch

ASKED = 4  # images on which a surrogate is compared


def are_used(deployed: DefendedModel) -> bool:
    """Returns whether the attacker differentiates another function than the defended model."""
    return deployed.cell.attacker == "adaptive" and not deployed.defense.adaptive_equals_whitebox


def agree(deployed: DefendedModel, batch: Batch) -> bool:
    """Returns whether surrogates have the defended model's values, so that an image that fools them may stop early.

    Asked of clean images; what they say of the others is judged after the attack (:func:`spared`).
    """
    if not are_used(deployed):
        return True
    images, ids = batch.images[:ASKED], batch.ids[:ASKED]
    with deployed.counted.paused(), torch.no_grad():
        right = deployed.predict(images, ids)
        return all(
            same(surrogate(images, ImageRng(deployed.cell.seed, ids, "deployed")).logits, right)
            for surrogate in deployed.defense.surrogates(deployed.counted)
        )


def spared(
    deployed: DefendedModel, fitted: FittedAttack, crafted: CraftedBatch, labels: Tensor, ids: list[str]
) -> Tensor:
    """Returns (n,) images that fool a surrogate, so that their attack stopped early, but not the defended model."""
    if not are_used(deployed) or deployed.defense.stochastic:  # of a random pipeline none leaves early
        return torch.empty(0, dtype=torch.int64)
    with deployed.counted.paused(), fitted.conditions():
        right = deployed.answer(crafted.images, ids).predictions == labels
    return (crafted.fooled & right).nonzero()[:, 0].cpu()
