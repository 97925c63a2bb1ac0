"""Formats tables in GitHub's Markdown."""

from __future__ import annotations

import re

from tabulate import tabulate

from vlmdefend.evaluation.statistics.diagnostics import ATTACKERS
from vlmdefend.reporting.tables.groups import (
    VerdictTable,
    attacker_text,
    clean_text,
    eps_text,
    ms_text,
    passes_text,
    plain,
    worst_header,
    worst_text,
)

ALIGN = ("left", "left", *["right"] * (2 + len(ATTACKERS)), "left", "right", "right", "left")


def markdown(groups: list[VerdictTable]) -> str:
    """Returns a heading, a table and its footnotes per verdict table; the best worst case of each radius is bold."""
    return "\n".join(_section(group) for group in groups)


def escape(text: str) -> str:
    """Escapes the markup of Markdown, and the pipe that would end a table's cell."""
    return re.sub(r"([\\`*_{}\[\]<>|~#$&])", r"\\\1", plain(text))


def _section(group: VerdictTable) -> str:
    rows = []
    for defense, line in group.rows:
        worst = worst_text(line)
        rows.append(
            [
                escape(defense),
                escape(line.paradigm),
                eps_text(line),
                clean_text(line),
                *(attacker_text(line, attacker) for attacker in ATTACKERS),
                f"**{worst}**" if group.is_best(line) else worst,
                passes_text(line.cost.deployed_forwards, line.cost.deployed_backwards),
                ms_text(line.cost.deployed_ms),
                " ".join(line.flags),
            ]
        )
    headers = ["defense", "paradigm", "eps", "clean", *ATTACKERS, worst_header(group.lines)]
    headers += ["fwd+bwd", "ms/image", "flags"]
    table = tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True, colalign=ALIGN)
    notes = "".join(f"- {footnote.word} {escape(footnote.text)}\n" for footnote in group.footnotes)
    return f"### {escape(group.title)}\n\n{table}\n" + (f"\n{notes}" if notes else "")
