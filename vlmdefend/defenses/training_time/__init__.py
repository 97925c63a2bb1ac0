"""Training-time defenses by name: each is an objective, what one training step minimises."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmdefend.registry import Registry

if TYPE_CHECKING:
    from vlmdefend.defenses.training_time.base import Objective

OBJECTIVES: Registry[Objective] = Registry("method", (__name__,), shared=("base",), separator="-")
__all__ = ["OBJECTIVES"]
