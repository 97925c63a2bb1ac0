"""Formats the result of ``vlmdefend urda-train``: accuracies of teacher and student, and the terms of the bound."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from vlmdefend.evaluation.statistics.intervals import wilson
from vlmdefend.types import format_eps, parse_eps

CLASSIFIER = "vlmdefend_classifier.json"
ROWS = {
    "clean": "clean",
    "true_labels": "PGD, true labels",
    "pseudo_labels": "PGD, pseudo-labels",
    "worst": "worst of these",
}


def result_text(settings: dict[str, Any], summary: dict[str, Any], folder: Path) -> str:
    """Returns the result of a run as text of at most 80 columns (longer paths excepted).

    ``settings`` and ``summary`` are those written in ``folder``.
    """
    from tabulate import tabulate

    models = {"teacher": summary.get("before"), "student": summary.get("after")}
    there = {name: numbers for name, numbers in models.items() if numbers is not None}
    rows = [[label, *(interval(*n[row]) for n in there.values()), *_change(there, row)] for row, label in ROWS.items()]
    count = next(iter(there.values()))["clean"][1]
    headers = ["", *there, *(["change"] if len(there) > 1 else [])]
    lines = [
        f"{settings['target']}: {count} held-out images, right % [95 %]",
        f"attack: PGD-20, L_inf {format_eps(parse_eps(settings['eps']))}",
        "",
        tabulate(rows, headers=headers, tablefmt="simple", disable_numparse=True),
    ]
    if settings["select"] == "oracle":
        lines += ["", "ORACLE: the epoch was chosen by target labels."]
    lines += [*doubts(models), *bound(summary.get("theory", {}), list(there.values())[-1])]
    if (folder / CLASSIFIER).is_file():
        lines += ["", "PGD alone is no verdict. AutoAttack gives one:", f"  {verdict_command(settings, folder)}"]
    return "\n".join(lines)


def verdict_command(settings: dict[str, Any], folder: Path) -> str:
    """Returns the command that runs AutoAttack on the written classifier, on the same images at the same radius."""
    words = ["vlmdefend", "evaluate", "--model", f"local-dir:{folder}", "--dataset", settings["target"]]
    words += ["--attack", "autoattack", "--eps", format_eps(parse_eps(settings["eps"]))]
    limit = settings.get("eval_limit")
    words += ["--full"] if limit is None else ["--limit", str(limit)]
    if settings.get("eval_split", "test") != "test":
        words += ["--split", settings["eval_split"]]
    if settings.get("root"):
        words += ["--root", settings["root"]]
    return shlex.join(words)


def bound(theory: dict[str, Any], last: dict[str, Any]) -> list[str]:
    """Returns the terms of R_T^adv(h) <= R_S(g) + d/2 + lambda* + A_T(h, g) that can be estimated, with 95 % intervals.

    An elementary consequence of Ben-David et al. 2010, not the theorem of Huang et al. 2026. A linear domain classifier
    on the teacher's features gives a lower bound of d; PGD gives a lower bound of A_T.

    Args:
        theory: the terms, as counts.
        last: the counts of h: of the student, or of the teacher if there is no student.
    """
    if not theory:
        return []
    errors, m = theory["domain_errors"]
    low, high = wilson(errors, m)
    distance, least, most = (max(0.0, 2.0 - 4.0 * share) for share in (errors / m, high, low))
    target, (apart, n), (robust, _) = theory["target_accuracy"], theory["disagreement"], last["pseudo_labels"]
    return [
        "",
        "error under attack on the target <= R_S + d/2 + lambda* + A_T",
        f"  R_S      the teacher's error on the source    {_error(*theory['source_accuracy'])}",
        f"  d        proxy A-distance, from below         {distance:.3f} [{least:.3f}, {most:.3f}]",
        "  lambda*  the best joint error                 not estimated: it needs labels",
        f"  A_T      not the teacher's class under PGD    {_error(n - apart, n)}",
        f"  R_T      the teacher's error on the target    {_error(*target)} by labels",
        f"checked: {robust} right under attack >= {target[0]} the teacher has right - {apart} apart from it",
    ]


def doubts(models: dict[str, dict[str, Any] | None]) -> list[str]:
    """Returns a warning for each model on which the attack with true labels is weaker than that with pseudo-labels.

    True labels can only help an attack, so the weaker attack has failed.
    """
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
    """Returns a percentage with its Wilson interval, as ``85.2 [81.8, 88.0]``."""
    low, high = wilson(hits, n)
    return f"{100 * hits / n:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _change(there: dict[str, dict[str, Any]], row: str) -> list[str]:
    """Returns the change from teacher to student in points; empty if only one of them was measured."""
    if len(there) < 2:
        return []
    before, after = (hits / n for hits, n in (numbers[row] for numbers in there.values()))
    return [f"{100 * (after - before):+.1f}"]


def _error(hits: int, n: int) -> str:
    """Returns an error rate with its Wilson interval, as ``0.148 [0.120, 0.182]``."""
    low, high = wilson(n - hits, n)
    return f"{1 - hits / n:.3f} [{low:.3f}, {high:.3f}]"
