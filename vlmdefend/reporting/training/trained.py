"""Formats the held-out accuracies of ``vlmdefend distill`` and ``train``."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmdefend.reporting.training.adaptation import interval

Counts = tuple[int, int]  # right, of n
Measured = Mapping[str, tuple[Counts, Counts]]  # "vanilla", "pivot", "result", "mix-0.5" -> clean, under attack


def measured(summary: Mapping[str, Any]) -> Measured:
    """Returns the counts of each model in a run's summary, in its order; empty if no image was held out."""
    parts = summary.get("measured", summary)
    names = [name for name in parts if name in ("vanilla", "pivot", "result") or name.startswith("mix-")]
    return {name: (tuple(parts[name][0]), tuple(parts[name][1])) for name in names if parts[name]}


def held_out_text(model: str, dataset: str, eps: str, models: Measured) -> str:
    """Returns a table with clean and robust accuracy and their intervals per model; empty if none was measured."""
    from tabulate import tabulate

    if not models:
        return ""
    rows = [(name, interval(*clean), interval(*robust)) for name, (clean, robust) in models.items()]
    _, n = next(iter(models.values()))[0]
    table = tabulate(rows, headers=["", "clean % [95 %]", "robust % [95 %]"], tablefmt="simple", disable_numparse=True)
    return f"{model} on {n} held-out images of {dataset}, PGD-10 at {eps}\n\n{table}"


def verdict_command(model: str, eps: str, folder: Path) -> str:
    """Returns the command that runs AutoAttack on the vanilla model and on the result."""
    words = ["vlmdefend", "evaluate", "--model", f"{model},local-dir:{folder}"]
    return shlex.join([*words, "--attack", "autoattack", "--eps", eps])
