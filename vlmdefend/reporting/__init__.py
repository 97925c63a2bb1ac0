"""Turns the records of run folders into verdicts, tables and files. Loads no tensors and recomputes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmdefend.reporting.runs import load_runs
    from vlmdefend.reporting.tables.tables import print_verdict, render
    from vlmdefend.reporting.verdicts.seeds import over_seeds
    from vlmdefend.reporting.verdicts.verdict import verdict_rows

__all__ = ["load_runs", "over_seeds", "print_verdict", "render", "verdict_rows"]

_MODULES = {
    "load_runs": "runs",
    "over_seeds": "verdicts.seeds",
    "print_verdict": "tables.tables",
    "render": "tables.tables",
    "verdict_rows": "verdicts.verdict",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in __all__:
        module = _MODULES[name]
        return getattr(import_module(f"{__name__}.{module}"), name)
    from vlmdefend.moved import old_member

    return old_member(__name__, name)
