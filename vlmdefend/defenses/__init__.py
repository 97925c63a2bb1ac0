"""Defenses by name, in three paradigms: training-time, test-time adaptation, training-free."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmdefend.registry import Registry

if TYPE_CHECKING:
    from vlmdefend.defenses.base import Defense

DEFENSES: Registry[Defense] = Registry(
    "defense",
    (f"{__name__}.training_free", f"{__name__}.test_time", f"{__name__}.none"),
    group=__name__,
    separator="_",
)
__all__ = ["DEFENSES"]
