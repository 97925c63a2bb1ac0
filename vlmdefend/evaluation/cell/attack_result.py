"""Attacks the images of one batch that the defended model classifies correctly, and checks the budget."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vlmdefend.evaluation.cell import surrogates
from vlmdefend.evaluation.cell.attackers import CraftedBatch, craft
from vlmdefend.evaluation.cell.defended_model import DefendedModel
from vlmdefend.evaluation.cell.fitted_attacks import FittedAttack
from vlmdefend.evaluation.store.records import Checks
from vlmdefend.rng import ImageRng
from vlmdefend.types import Batch, Threat


class BatchResult(NamedTuple):
    """Result of an attack on one batch; an image not attacked, or outside the budget, is the clean one."""

    images: Tensor  # (B, 3, H, W)
    steps: Tensor  # (B,) gradient evaluations
    checks: Checks


def attack_batch(
    deployed: DefendedModel, fitted: FittedAttack, batch: Batch, right: Tensor, threat: Threat
) -> BatchResult:
    """Attacks the images ``right``, which the defended model classifies correctly, and checks the result.

    With surrogates, an image may stop early because a surrogate was fooled. If the deployed pipeline still classifies
    it correctly, it is attacked again without early stopping.

    Raises:
        UserError: the attack received logits that are not finite.
    """
    adversarial = batch.images.clone()
    steps = torch.zeros(len(batch.ids), dtype=torch.int64)
    if not len(right):
        return BatchResult(adversarial, steps, Checks())
    cell = deployed.cell
    labels, ids = batch.labels[right], [batch.ids[i] for i in right.tolist()]
    rng = ImageRng(cell.seed, ids, "attacker")

    def crafted_at(at: Tensor, *, stop: bool) -> CraftedBatch:
        images = batch.images[right[at]]  # a copy, which the attack may overwrite
        attack = (cell.attacker, fitted.attacks, deployed.defense, deployed.counted)
        return craft(*attack, images, labels[at], threat, rng.select(at), deployed.width, stop=stop)

    stop = surrogates.agree(deployed, batch)
    crafted = crafted_at(torch.arange(len(right)), stop=stop)
    if stop and crafted.finite:
        stopped = surrogates.fooled_surrogates_only(deployed, fitted, crafted, labels, ids)
        crafted = crafted.with_again(stopped, crafted_at(stopped, stop=False)) if len(stopped) else crafted
    if not crafted.finite:
        raise deployed.not_finite()
    inside = threat.contains(crafted.images, batch.images[right])
    adversarial[right[inside]] = crafted.images[inside]
    steps[right.cpu()] = crafted.steps
    checks = Checks(
        gradient_values=crafted.gradient_values,
        zero_gradients=crafted.zero_gradients,
        outside_budget=crafted.outside + int((~inside).sum()),
    )
    return BatchResult(adversarial, steps, checks)
