"""Compares an adaptive attacker's surrogates with the defended model, which may resist what fools a surrogate."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmdefend.evaluation.cell.attackers import CraftedBatch
from vlmdefend.evaluation.cell.defended_model import DefendedModel, same
from vlmdefend.evaluation.cell.fitted_attacks import FittedAttack
from vlmdefend.rng import ImageRng
from vlmdefend.types import Batch

COMPARED_IMAGES = 4  # images on which a surrogate is compared


def are_used(deployed: DefendedModel) -> bool:
    """Returns whether the attacker differentiates another function than the defended model."""
    return deployed.cell.attacker == "adaptive" and not deployed.defense.adaptive_equals_whitebox


def agree(deployed: DefendedModel, batch: Batch) -> bool:
    """Returns whether surrogates and defended model have equal logits, so that an image may stop early.

    Only a few clean images are compared; adversarial images are compared after the attack, by
    :func:`fooled_surrogates_only`.
    """
    if not are_used(deployed):
        return True
    images, ids = batch.images[:COMPARED_IMAGES], batch.ids[:COMPARED_IMAGES]
    with deployed.counted.paused(), torch.no_grad():
        logits = deployed.logits(images, ids)
        return all(
            same(surrogate(images, ImageRng(deployed.cell.seed, ids, "deployed")).logits, logits)
            for surrogate in deployed.defense.surrogates(deployed.counted)
        )


def fooled_surrogates_only(
    deployed: DefendedModel, fitted: FittedAttack, crafted: CraftedBatch, labels: Tensor, ids: list[str]
) -> Tensor:
    """Returns (n,) indices of images that fool a surrogate, where their attack stopped, but not the defended model."""
    if not are_used(deployed) or deployed.defense.stochastic:  # with a random pipeline no image stops early
        return torch.empty(0, dtype=torch.int64)
    with deployed.counted.paused(), fitted.conditions():
        right = deployed.predict(crafted.images, ids).predictions == labels
    return (crafted.fooled & right).nonzero()[:, 0].cpu()
