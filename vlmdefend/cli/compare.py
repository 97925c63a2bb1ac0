"""``vlmdefend compare``: compares two run folders; a gate for CI."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class ComparisonFormat(StrEnum):
    """The output format of a comparison."""

    TERMINAL = "terminal"
    MARKDOWN = "markdown"
    JSON = "json"


def compare(
    before: Annotated[Path, typer.Argument(help="Run folder of `evaluate`: what was accepted.")],
    after: Annotated[Path, typer.Argument(help="Run folder of the same command: what is new.")],
    tolerance: Annotated[float, typer.Option(help="Points of accuracy that may be lost.")] = 0.0,
    alpha: Annotated[
        float, typer.Option(help="A loss counts where chance alone would show one as large with less than this.")
    ] = 0.05,
    format: Annotated[
        ComparisonFormat, typer.Option("--format", "-f", help="How to write it.")
    ] = ComparisonFormat.TERMINAL,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write to this file instead.")] = None,
) -> None:
    """Compare two runs image by image; fail where accuracy fell by more than chance.

    Every setting of the first folder must be in the second: the same images,
    prompts, protocol, defense, attacks, radius and seed. Weights, code and
    machine may differ. Both clean and worst-case accuracy are compared. A number
    that has become doubtful (MASKED?) fails as well: it may have risen because
    the attack broke.

    Exit code: 0 nothing fell, 1 something did, 2 wrong usage, 3 not comparable.
    """
    from vlmdefend.errors import UserError
    from vlmdefend.reporting.compare.compare import NotComparable, needed
    from vlmdefend.reporting.compare.compare import compare as pair
    from vlmdefend.reporting.compare.comparison_table import as_json, as_markdown, as_text, verdict
    from vlmdefend.reporting.files import save
    from vlmdefend.reporting.runs import load_runs, unfinished

    if not 0 <= tolerance <= 100:
        raise UserError(f"--tolerance {tolerance:g}: must be from 0 to 100, in points of accuracy.")
    if not 0 < alpha < 1:
        raise UserError(f"--alpha {alpha:g}: must be between 0 and 1; 0.05 is usual.")
    for folder in (before, after):
        if waiting := unfinished([folder]):
            raise UserError(
                f"{folder}: {waiting} cell{'s are' if waiting > 1 else ' is'} half done; run the same `vlmdefend "
                "evaluate` command again to finish."
            )
    found = pair(load_runs([before]), load_runs([after]))
    limits = tolerance / 100, alpha
    least, n = needed(found, *limits), min(comparison.clean.n for comparison in found)
    if least > n and tolerance < 100:
        raise NotComparable(
            f"{n} images cannot show a fall at --alpha {alpha:g}: it would take {least}; give more images."
        )
    write = {"terminal": as_text, "markdown": as_markdown, "json": as_json}[format.value]
    text = write(found, *limits)
    if out is not None:
        save(text, out)
    else:
        typer.echo(text)
    bad = sum(verdict(comparison, *limits) != "ok" for comparison in found)
    outcome = f"{bad} of {len(found)} failed" if bad else "nothing fell"
    total = f"{len(found)} comparison{'s' if len(found) > 1 else ''}"
    typer.echo(f"{total}: {outcome}; {least} images lost of {n}, and none won, would count as a fall.", err=True)
    if bad:
        raise typer.Exit(1)
