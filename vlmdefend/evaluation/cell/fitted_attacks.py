"""Fits attacks that need a whole set (universal, patch, text) before the first shard is attacked."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from vlmdefend.attacks.base import Attack
from vlmdefend.evaluation.cell.attackers import Variant, fit, variants
from vlmdefend.evaluation.cell.defended_model import DefendedModel
from vlmdefend.evaluation.store.environment import peak_memory_mb, reset_peak_memory
from vlmdefend.evaluation.store.records import Checks, Cost
from vlmdefend.models.zero_shot.text_side import TextSide
from vlmdefend.rng import ImageRng
from vlmdefend.types import Batch, Threat


@dataclass(frozen=True, kw_only=True)
class FittedAttack:
    """The fitted attack of each variant of the attacker, and the cost of the fit."""

    attacks: Mapping[Variant, Attack]
    text_side: TextSide | None  # the model's prompts, if the attack changes them
    cost: Cost = field(default_factory=Cost)
    checks: Checks = field(default_factory=Checks)

    def conditions(self) -> AbstractContextManager[None]:
        """Returns the context in which results are scored; in it, the model uses the attacked prompts, if any."""
        return self._any.conditions(self.text_side)

    def attacked_prompts(self) -> list[str]:
        """Returns one attacked prompt per class."""
        return self._any.attacked_prompts(self.text_side)

    @property
    def _any(self) -> Attack:
        """Returns the attack of one variant; prompts are the same for all."""
        return next(iter(self.attacks.values()))


def unfitted(deployed: DefendedModel, attack: Attack) -> FittedAttack:
    """Returns every variant with the unfitted attack, as the evaluator starts with it."""
    return FittedAttack(
        attacks=dict.fromkeys(variants(deployed.cell.attacker, deployed.defense), attack),
        text_side=_text_side(deployed, attack),
    )


def sample(count: int, learns_from: int) -> list[int]:
    """Returns indices of at most ``learns_from`` of ``count`` images, evenly spread, the same in a resumed run."""
    chosen = min(learns_from, count)
    return [i * count // chosen for i in range(chosen)]


def fit_attack(deployed: DefendedModel, attack: Attack, batch: Batch) -> FittedAttack:
    """Fits ``attack`` to these images and returns it with the cost of the fit.

    Raises:
        UserError: the attack received logits that are not finite.
    """
    cell, device = deployed.cell, batch.images.device
    rng = ImageRng(cell.seed, batch.ids, "fit")
    reset_peak_memory(device)
    before = deployed.counted.spent()
    setting = (cell.attacker, attack, deployed.defense, deployed.counted)
    fitted = fit(*setting, batch.images, batch.labels, Threat(cell.norm, cell.eps), rng, deployed.width)
    if not fitted.finite:
        raise deployed.not_finite()
    spent = deployed.counted.spent().since(before)
    return FittedAttack(
        attacks=fitted.attacks,
        text_side=_text_side(deployed, attack),
        cost=Cost(
            attack_forwards=spent.forwards,
            attack_backwards=spent.backwards,
            attack_seconds=spent.seconds,
            peak_memory_mb=peak_memory_mb(device),
        ),
        checks=Checks(gradient_values=fitted.gradient_values, zero_gradients=fitted.zero_gradients),
    )


def _text_side(deployed: DefendedModel, attack: Attack) -> TextSide | None:
    return getattr(deployed.model, "text_side", None) if attack.changes_prompts else None
