"""``vlmdefend evaluate``: the grid, its progress, its table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlmdefend.cli import complete, grid_options
from vlmdefend.cli.grid_options import DATASET, DEFENSE, HOW, MODEL, OPTION, RUN

if TYPE_CHECKING:
    from vlmdefend.evaluation.plan import Plan

Names = list[str] | None


def evaluate(
    ctx: typer.Context,
    model: Annotated[Names, MODEL] = None,
    defense: Annotated[Names, DEFENSE] = None,
    dataset: Annotated[Names, DATASET] = None,
    split: grid_options.Split = None,
    limit: grid_options.Limit = None,
    full: grid_options.Full = False,
    classes: grid_options.Classes = None,
    templates: grid_options.Templates = None,
    weights: grid_options.Weights = None,
    root: grid_options.Root = None,
    skip_bad: grid_options.SkipBad = False,
    attack: Annotated[
        Names,
        OPTION(
            "--attack",
            "-a",
            help="pgd, fgsm, none, pgd:steps=100:loss=dlr ...  \\[default: pgd]",
            autocompletion=complete.attacks,
            rich_help_panel=HOW,
        ),
    ] = None,
    eps: Annotated[
        Names, OPTION(help="Radius, 4/255 or 0.03.  \\[default: the protocol's list]", rich_help_panel=HOW)
    ] = None,
    norm: grid_options.Norm = None,
    steps: grid_options.Steps = None,
    attacker: Annotated[
        Names, OPTION(help="transfer, whitebox, adaptive.  \\[default: all three]", rich_help_panel=HOW)
    ] = None,
    adversarial: Annotated[
        Names,
        OPTION(help="Folders of `vlmdefend attack`: score these images, attack nothing.", rich_help_panel=HOW),
    ] = None,
    protocol: grid_options.Protocol = None,
    seed: Annotated[Names, OPTION(help="One or several.  \\[default: 0]", rich_help_panel=HOW)] = None,
    out: Annotated[
        Path | None,
        OPTION(help="Run folder; the same command resumes in it.  \\[default: runs]", rich_help_panel=RUN),
    ] = None,
    config: grid_options.Config = None,
    batch_size: grid_options.BatchSize = None,
    device: grid_options.Device = None,
    threads: grid_options.Threads = None,
    plugin: grid_options.Plugin = None,
    dry_run: grid_options.DryRun = False,
    debug: grid_options.Debug = False,
) -> None:
    """Attack models behind defenses and print how many images survive. Every list-valued option multiplies the grid.

    [bold]vlmdefend evaluate --attack pgd[/bold] runs anywhere: the embedded model on the embedded images.
    """
    settings = grid_options.read_file(config)
    folder = settings.pop("out", None) or "runs"
    grid = grid_options.make_grid(ctx.params, settings)

    from vlmdefend.evaluation.plan import make_plan

    plan = make_plan(grid)
    if dry_run:
        print_plan(plan)
        return
    _run(plan, out or Path(str(folder)), debug=debug)


def _run(plan: Plan, out: Path, *, debug: bool) -> None:
    from vlmdefend.cli.progress import progress_listener
    from vlmdefend.evaluation.run import run_plan
    from vlmdefend.evaluation.store import Store
    from vlmdefend.reporting import print_verdict
    from vlmdefend.reporting.transfer import print_transfer

    store = Store(out)
    try:
        with progress_listener(plan) as listener:
            evaluation = run_plan(plan, store, listener, debug=debug)
    except KeyboardInterrupt:
        typer.echo(f"interrupted; what is done is kept in {out}, the same command goes on from there.", err=True)
        raise typer.Exit(130) from None
    if evaluation.results:
        (print_transfer if plan.grid.adversarial else print_verdict)(evaluation.results)
        found = f", {evaluation.reused} of them found done" if evaluation.reused else ""
        cells = f"{len(evaluation.results)} cell{'s' if len(evaluation.results) > 1 else ''}"
        typer.echo(f"\n{cells} in {out}{found}; `vlmdefend report {out}` shows them again.")
    for failure in evaluation.failures:
        typer.echo(f"error: {failure.what}: {failure.message}", err=True)
    if evaluation.failures:
        raise typer.Exit(2 if all(failure.users for failure in evaluation.failures) else 1)


def print_plan(plan: Plan) -> None:
    """The cells with the most that each may cost."""
    from tabulate import tabulate

    from vlmdefend.types import format_eps

    rows, total = [], [0, 0]
    for cell in plan.cells:
        forwards, backwards = cell.gradients()
        total = [total[0] + forwards, total[1] + backwards]
        budget = "–" if cell.attack.name == "none" else format_eps(cell.eps)
        names = (cell.model, cell.defense.name, cell.images.name, cell.attack.name, budget, cell.attacker)
        rows.append([*names, cell.seed, len(cell.images), forwards, backwards])
    headers = ["model", "defense", "dataset", "attack", "eps", "attacker", "seed", "n", "forwards", "backwards"]
    typer.echo(tabulate(rows, headers=headers, tablefmt="simple"))
    typer.echo(
        f"\n{len(rows)} cells, at most {total[0]:,} forwards and {total[1]:,} backwards of one image; images that are "
        "fooled early cost less. Nothing was computed (--dry-run)."
    )
