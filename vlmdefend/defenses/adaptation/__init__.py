"""Domain adaptation methods by name: adapting a teacher to an unlabelled domain, and training a robust student."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmdefend.registry import Registry

if TYPE_CHECKING:
    from vlmdefend.defenses.adaptation.base import Adaptation

ADAPTATIONS: Registry[Adaptation] = Registry("adaptation", (__name__,), shared=("base",), separator="-")
__all__ = ["ADAPTATIONS"]
