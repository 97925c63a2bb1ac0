"""A folder of ``vlmdefend urda-train`` to text: the three numbers of teacher and student, the terms of the bound."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlmdefend.errors import UserError
from vlmdefend.evaluation.statistics import wilson
from vlmdefend.types import format_eps, parse_eps

SETTINGS, SUMMARY = Path("training", "settings.json"), Path("training", "summary.json")
COLUMNS = ("clean", "true_labels", "pseudo_labels", "worst")
HEADERS = ("", "clean", "PGD, true labels", "PGD, pseudo-labels", "worst")


def is_adaptation(folder: Path) -> bool:
    """Whether the folder is one of ``urda-train``."""
    return (folder / SETTINGS).is_file() and "robustify" in _read(folder / SETTINGS)


def adaptation_text(folder: Path) -> str:
    """The table and the bound of a finished run.

    Raises:
        UserError: the run is not finished, or its files are not whole.
    """
    summary = _read(folder / SUMMARY) if (folder / SUMMARY).is_file() else {}
    if not summary.get("finished"):
        raise UserError(f"{folder}: is not finished; run the same `vlmdefend urda-train` command again.")
    return result_text(_read(folder / SETTINGS), summary)


def result_text(settings: dict[str, Any], summary: dict[str, Any]) -> str:
    """Settings and summary, as they are written, to text."""
    from tabulate import tabulate

    models = {"teacher": summary.get("before"), "student": summary.get("after")}
    rows = [(name, *(interval(*n[c]) for c in COLUMNS)) for name, n in models.items() if n is not None]
    count = next(n for n in models.values() if n is not None)["clean"][1]
    eps = format_eps(parse_eps(settings["eps"]))
    lines = [
        f"{settings['target']}, {count} held-out images; PGD-20, L_inf {eps}, right % [95 %]",
        "",
        tabulate(rows, headers=HEADERS, tablefmt="simple", disable_numparse=True),
    ]
    if settings["select"] == "oracle":
        lines += ["", "ORACLE: the epoch was chosen by target labels."]
    return "\n".join([*lines, *doubts(models), *bound(summary.get("theory", {}))])


def bound(theory: dict[str, Any]) -> list[str]:
    """The terms of R_T^adv(h) <= R_S(g) + d/2 + lambda* + A_T(h, g) that can be estimated, with 95 % intervals.

    An elementary consequence of Ben-David et al. 2010, not the theorem of Huang et al. 2026. A linear domain classifier
    on the teacher's features gives d from below; PGD gives A_T from below.
    """
    if not theory:
        return []
    errors, m = theory["domain_errors"]
    low, high = wilson(errors, m)
    distance, least, most = (max(0.0, 2.0 - 4.0 * share) for share in (errors / m, high, low))
    source, target = theory["source_accuracy"], theory["target_accuracy"]
    lines = [
        "",
        "error under attack on the target <= R_S + d/2 + lambda* + A_T",
        f"  R_S      the teacher's error on the source         {_error(*source)}",
        f"  d        proxy A-distance on its features          {distance:.3f} [{least:.3f}, {most:.3f}]",
        "  lambda*  best joint error                          needs target labels, not estimated",
        f"  R_T      the teacher's error on the target         {_error(*target)}   (by labels; <= the three above)",
    ]
    if "disagreement" in theory:
        apart, n = theory["disagreement"]
        lines.append(f"  A_T      other class than the teacher's under PGD  {_error(n - apart, n)}   (at least)")
        lines.append("  checked on every attacked batch: right under attack >= teacher right - disagreement")
    return lines


def doubts(models: dict[str, dict[str, Any] | None]) -> list[str]:
    """An attack that knows the true labels and does less harm than one with guessed ones has failed."""
    found = []
    for name, numbers in models.items():
        if numbers is None:
            continue
        true, pseudo = numbers["true_labels"], numbers["pseudo_labels"]
        if wilson(*true)[0] > wilson(*pseudo)[1]:
            found += [
                "",
                f"MASKED? {name}: the attack with true labels does less harm than the one with pseudo-labels.",
            ]
    return found


def interval(hits: int, n: int) -> str:
    """``85.2 [81.8, 88.0]``."""
    low, high = wilson(hits, n)
    return f"{100 * hits / n:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _error(hits: int, n: int) -> str:
    low, high = wilson(n - hits, n)
    return f"{1 - hits / n:.3f} [{low:.3f}, {high:.3f}]"


def _read(file: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{file}: is not whole; run the same `vlmdefend urda-train` command again.") from None
    return found
