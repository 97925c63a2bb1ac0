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
        list[Path] | None,
        typer.Argument(help="Folders of `evaluate` or of a training command (default: runs)."),
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

    Of a folder of `distill`, `train` or `urda-train`: what was measured there. Reads files only; nothing is recomputed,
    and the folders are not written to.
    """
    from vlmdefend.errors import UserError
    from vlmdefend.reporting.files import save
    from vlmdefend.reporting.runs import load_runs, only, unfinished
    from vlmdefend.reporting.tables.tables import print_verdict, render
    from vlmdefend.reporting.training.training_runs import training_run, training_text
    from vlmdefend.reporting.verdicts.verdict import verdict_rows

    chosen = format or (SUFFIXES.get(out.suffix.lower(), Format.TERMINAL) if out else Format.TERMINAL)
    if chosen is Format.PARQUET and out is None:
        raise UserError("--format parquet: is no text for a terminal; add --out FILE.parquet.")
    found = {folder: training_run(folder) for folder in runs or [Path("runs")]}
    folders = [folder for folder, run in found.items() if run is None]
    trained = [run for run in found.values() if run is not None]
    if trained and chosen is not Format.TERMINAL:
        raise UserError(
            f"{trained[0].folder}: is a run of `vlmdefend {trained[0].command}`, which is shown as text only, not as "
            f"{chosen}; leave out --format, and the suffix of --out."
        )
    texts = [training_text(run) for run in trained]
    wanted = {"models": model or (), "defenses": defense or (), "datasets": dataset or ()}
    cells = only(load_runs(folders), **wanted) if folders else []
    if waiting := unfinished(folders):
        typer.echo(
            f"{waiting} cell{'s are' if waiting > 1 else ' is'} half done and not in this report; run the same "
            "`vlmdefend evaluate` command again to finish.",
            err=True,
        )
    if out is None and chosen is Format.TERMINAL:
        for text in texts:
            typer.echo(text)
        if cells:
            print_verdict(cells)
        return
    lines = verdict_rows(cells)
    if chosen is Format.PARQUET:
        from vlmdefend.reporting.tables.frame import parquet

        content: str | bytes = parquet(lines)
    else:
        content = "\n".join([*texts, *([render(lines, chosen)] if cells else [])])
    if out is None:
        typer.echo(content, nl=False)
        return
    save(content, out)
    written = [_count(len(texts), "training run")] if texts else []
    written += [_count(len(lines), "line")] if cells else []
    typer.echo(f"{out}: written, {' and '.join(written)}.", err=True)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
