"""Attacks by name. An attack sees a view (pixels to logits), never a defense."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmdefend.registry import Registry

if TYPE_CHECKING:
    from vlmdefend.attacks.base import Attack

ATTACKS: Registry[Attack] = Registry(
    "attack",
    (__name__,),
    shared=("base", "view", "goal", "losses", "slots", "adaptive", "external"),
    separator="-",
    families={"torchattacks": f"{__name__}.external"},
)
__all__ = ["ATTACKS"]
