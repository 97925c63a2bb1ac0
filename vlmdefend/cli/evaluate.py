"""``vlmdefend evaluate``: evaluates a grid, shows its progress, prints its table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlmdefend.cli.options.common import RUN, Debug, resumable
from vlmdefend.cli.options.grid_options import Config, DryRun, Plugin, make_grid, read_file
from vlmdefend.cli.options.parameters import options_of
from vlmdefend.evaluation.grid.grid import Grid

if TYPE_CHECKING:
    from vlmdefend.evaluation.grid.planned import Plan


@options_of(Grid)
def evaluate(
    given: dict[str, Any],
    out: Annotated[
        Path | None,
        typer.Option(help="Run folder; the same command resumes in it.  \\[default: runs]", rich_help_panel=RUN),
    ] = None,
    config: Config = None,
    plugin: Plugin = None,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Attack models behind defenses and print how many images survive. Every list-valued option multiplies the grid.

    [bold]vlmdefend evaluate --attack pgd[/bold] runs anywhere: the embedded model on the embedded images.
    """
    settings = read_file(config)
    folder = settings.pop("out", None) or "runs"
    grid = make_grid(given, settings, plugin)

    from vlmdefend.evaluation.make_plan import make_plan

    plan = make_plan(grid)
    if dry_run:
        print_plan(plan)
        return
    _run(plan, out or Path(str(folder)), debug=debug)


def _run(plan: Plan, out: Path, *, debug: bool) -> None:
    """Computes the cells and prints their table; exit code 2 or 1 where cells failed."""
    from vlmdefend.cli.output.progress import show_progress
    from vlmdefend.cli.output.progress_text import GridText
    from vlmdefend.evaluation.launchers.inline import run_plan
    from vlmdefend.evaluation.store.run_folder import Store
    from vlmdefend.reporting import print_verdict
    from vlmdefend.reporting.runs import half_done_cells
    from vlmdefend.reporting.tables.transfer import print_transfer

    store = Store(out)
    with resumable(out, "done"), show_progress(GridText(plan)) as progress:
        evaluation = run_plan(plan, store, progress, debug=debug)
    if evaluation.results:
        (print_transfer if plan.grid.adversarial else print_verdict)(evaluation.results)
        found = f", {evaluation.reused} of them found done" if evaluation.reused else ""
        cells = f"{len(evaluation.results)} cell{'s' if len(evaluation.results) > 1 else ''}"
        typer.echo(f"\n{cells} in {out}{found}; `vlmdefend report {out}` shows them again.")
    for cell in half_done_cells(out) if not evaluation.failures else ():  # a failed cell may be half done itself
        typer.echo(
            f"{cell}: half done and not used here: another command, perhaps still running, or another version of "
            "vlmdefend began it; delete the folder if it is not needed.",
            err=True,
        )
    for failure in evaluation.failures:
        typer.echo(f"error: {failure.what}: {failure.message}", err=True)
    if evaluation.failures:
        raise typer.Exit(2 if all(failure.users for failure in evaluation.failures) else 1)


def print_plan(plan: Plan) -> None:
    """Prints the cells with the most that each may cost, one table per model and data set."""
    from itertools import groupby

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from vlmdefend.types import format_eps

    console, total = Console(highlight=False), [0, 0]
    for (model, dataset, n), cells in groupby(plan.cells, lambda c: (c.model, c.images.name, len(c.images))):
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
        for header in ("defense", "attack"):
            table.add_column(header, overflow="fold")
        for header in ("eps", "attacker"):
            table.add_column(header, no_wrap=True)
        for header in ("seed", "forwards", "backwards"):
            table.add_column(header, no_wrap=True, justify="right")
        for cell in cells:
            spent = cell.gradients()
            total = [before + more for before, more in zip(total, spent, strict=True)]
            eps = "–" if cell.attack.name == "none" else format_eps(cell.eps)
            words = (cell.defense.name, cell.attack.name, eps, cell.attacker, cell.seed, *spent)
            table.add_row(*(Text(str(word)) for word in words))
        console.print(Text(f"{model} on {dataset}, {n} image{'s' if n > 1 else ''}"), table, "", sep="\n")
    defended = any(cell.defense.name != "none" for cell in plan.cells)
    behind = " behind its defense, which may run it several times in each (views, draws, steps of its own)"
    typer.echo(
        f"{len(plan.cells)} cells, at most {total[0]:,} forwards and {total[1]:,} backwards of one image through the "
        f"model{behind if defended else ''}; images that are fooled early cost less. Nothing was computed (--dry-run)."
    )
