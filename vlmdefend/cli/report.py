"""``vlmdefend report``: run folders to a table, or to a file for a paper, a page or a notebook."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Format(StrEnum):
    """How the report is written."""

    TERMINAL = "terminal"
    MARKDOWN = "markdown"
    LATEX = "latex"
    CSV = "csv"
    PARQUET = "parquet"


SUFFIXES = {
    ".txt": Format.TERMINAL,
    ".md": Format.MARKDOWN,
    ".tex": Format.LATEX,
    ".csv": Format.CSV,
    ".parquet": Format.PARQUET,
}


def report(
    runs: Annotated[
        list[Path] | None, typer.Argument(help="Folders of `evaluate` or `urda-train` (default: runs).")
    ] = None,
    format: Annotated[
        Format | None,
        typer.Option("--format", "-f", help="How to write it (default: by the suffix of --out, else terminal)."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write to this file instead of the terminal.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="Only this model; may be repeated.")] = None,
    defense: Annotated[list[str] | None, typer.Option(help="Only this defense; may be repeated.")] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="Only this data set; may be repeated.")] = None,
) -> None:
    """Show the verdict that run folders hold: robust accuracy per attacker, the worst case, doubts and costs.

    Reads the records only; nothing is recomputed, and the folders are not written to.
    """
    from vlmdefend.errors import UserError
    from vlmdefend.reporting.adaptation import adaptation_text, is_adaptation
    from vlmdefend.reporting.runs import load_runs, only, unfinished
    from vlmdefend.reporting.verdict import verdict_lines

    folders = runs or [Path("runs")]
    adapted = [folder for folder in folders if is_adaptation(folder)]
    for folder in adapted:
        typer.echo(f"{folder}\n\n{adaptation_text(folder)}\n")
    if adapted and len(adapted) == len(folders):
        return
    folders = [folder for folder in folders if folder not in adapted]
    chosen = format or (SUFFIXES.get(out.suffix.lower(), Format.TERMINAL) if out else Format.TERMINAL)
    if chosen is Format.PARQUET and out is None:
        raise UserError("--format parquet: is no text for a terminal; add --out FILE.parquet.")
    cells = only(load_runs(folders), models=model or (), defenses=defense or (), datasets=dataset or ())
    if waiting := unfinished(folders):
        typer.echo(
            f"{waiting} cell{'s are' if waiting > 1 else ' is'} half done and not in this report; run the same "
            "`vlmdefend evaluate` command again to finish.",
            err=True,
        )
    lines = verdict_lines(cells)
    if out is not None:
        from vlmdefend.reporting.files import save
        from vlmdefend.reporting.frame import parquet
        from vlmdefend.reporting.tables import render

        save(parquet(lines) if chosen is Format.PARQUET else render(lines, chosen), out)
        typer.echo(f"{out}: written, {len(lines)} line{'s' if len(lines) != 1 else ''}.", err=True)
    elif chosen is Format.TERMINAL:
        from vlmdefend.reporting.tables import print_verdict

        print_verdict(cells)
    else:
        from vlmdefend.reporting.tables import render

        typer.echo(render(lines, chosen), nl=False)
