"""Records to verdicts, tables and files. Reads run folders only: no tensors, nothing is recomputed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmdefend.reporting.runs import load_runs
    from vlmdefend.reporting.seeds import over_seeds
    from vlmdefend.reporting.tables import print_verdict, render
    from vlmdefend.reporting.verdict import verdict_lines

__all__ = ["load_runs", "over_seeds", "print_verdict", "render", "verdict_lines"]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in __all__:
        room = {"load_runs": "runs", "over_seeds": "seeds", "verdict_lines": "verdict"}.get(name, "tables")
        return getattr(import_module(f"{__name__}.{room}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
