"""Prints tables on a terminal of at least 80 columns, or returns them as plain text. Numbers are never wrapped."""

from __future__ import annotations

import io

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlmdefend.evaluation.statistics.diagnostics import ATTACKERS
from vlmdefend.reporting.tables.groups import (
    Footnote,
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

NARROWEST = 80
WIDE = 100  # columns from which the cost fits beside the verdict
_STYLES = {"MASKED?": "bold red", "BUDGET!": "bold red", "ERROR": "red", "note": "dim"}


def print_groups(groups: list[VerdictTable], console: Console) -> None:
    """Prints every table: title, rows, footnotes, and the costs in a table of their own where they do not fit beside.

    Lines are not cut for a terminal narrower than a table; the terminal wraps them.
    """
    own_width, width = console.width, max(console.width, NARROWEST)
    console.width = width
    try:
        for position, group in enumerate(groups):
            if position:
                console.print()
            _print_group(group, console, wide=width >= WIDE)
    finally:
        console.width = own_width


def _print_group(group: VerdictTable, console: Console, *, wide: bool) -> None:
    parts: list[Text | Table] = [Text(group.title, style="bold"), _verdicts(group, wide=wide)]
    parts += [_footnote(footnote) for footnote in group.footnotes]
    if group.costs and not wide:
        parts += [Text(), _costs(group)]
    for part in parts:
        console.print(part, crop=False, highlight=False)


def text(groups: list[VerdictTable], width: int = NARROWEST) -> str:
    """Returns the tables as plain text of ``width`` columns."""
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        print_groups(groups, console)
    return "".join(line.rstrip() + "\n" for line in capture.get().splitlines())


def _table(defenses: list[str]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("defense", overflow="fold", min_width=min(8, max(map(len, defenses), default=8)))
    return table


def _verdicts(group: VerdictTable, *, wide: bool) -> Table:
    """Returns the table of accuracies, with the costs if ``wide``."""
    table = _table([defense for defense, _ in group.rows])
    flagged = any(line.flags for line in group.lines)
    for header in ("eps", "clean", *ATTACKERS):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column(Text(worst_header(group.lines)), no_wrap=True)
    if wide:
        table.add_column("fwd+bwd", justify="right", no_wrap=True)
        table.add_column("ms/image", justify="right", no_wrap=True)
    if flagged:
        table.add_column("", no_wrap=True)
    for defense, line in group.rows:
        cells = [
            Text(defense),
            Text(eps_text(line)),
            Text(clean_text(line)),
            *(Text(attacker_text(line, attacker)) for attacker in ATTACKERS),
            Text(worst_text(line), style="bold" if group.is_best(line) else ""),
        ]
        if wide:
            cells += [
                Text(passes_text(line.cost.deployed_forwards, line.cost.deployed_backwards)),
                Text(ms_text(line.cost.deployed_ms)),
            ]
        if flagged:
            cells.append(Text("\n").join(Text(flag, style=_STYLES[flag]) for flag in line.flags))
        table.add_row(*cells)
    return table


def _costs(group: VerdictTable) -> Table:
    """Returns the table of costs per image: of the deployed pipeline, and of all attacks together."""
    table = _table([row.defense for row in group.costs])
    table.add_column("paradigm")
    for header in ("fwd+bwd", "ms/image", "attack fwd+bwd", "attack ms", "peak MB"):
        table.add_column(header, justify="right", no_wrap=True)
    for defense, paradigm, cost in group.costs:
        table.add_row(
            Text(defense),
            Text(plain(paradigm)),
            passes_text(cost.deployed_forwards, cost.deployed_backwards),
            ms_text(cost.deployed_ms),
            passes_text(cost.attack_forwards, cost.attack_backwards),
            ms_text(cost.attack_ms),
            ms_text(cost.peak_memory_mb),
        )
    return table


def _footnote(footnote: Footnote) -> Text:
    return Text.assemble((footnote.word, _STYLES[footnote.word]), " ", footnote.text)
