"""Attacks by name, one package per family. An attack receives a view (pixels to logits), never a defense."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmdefend.registry import Registry

if TYPE_CHECKING:
    from vlmdefend.attacks.base import Attack

FAMILIES = ("gradient", "minimum_norm", "query", "composite", "set_level", "text_level", "corruptions", "none")
ATTACKS: Registry[Attack] = Registry(
    "attack",
    tuple(f"{__name__}.{family}" for family in FAMILIES),
    group=__name__,
    separator="-",
    prefixes={"torchattacks": f"{__name__}.external"},
)
__all__ = ["ATTACKS"]
