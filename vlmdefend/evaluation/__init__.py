"""Evaluates a grid of cells (model x defense x data set x attack x attacker x eps x seed) and stores each record."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmdefend.evaluation.launchers.inline import evaluate

__all__ = ["evaluate"]


def __getattr__(name: str) -> Any:
    if name == "evaluate":
        from vlmdefend.evaluation.launchers.inline import evaluate

        return evaluate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
