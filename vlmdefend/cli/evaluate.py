"""``vlmdefend evaluate``: the grid, its progress, its table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlmdefend.cli import complete

if TYPE_CHECKING:
    from vlmdefend.evaluation.plan import Plan

WHAT, HOW, RUN = "What to evaluate", "How to attack", "How to run"
Names = list[str] | None


def evaluate(
    ctx: typer.Context,
    model: Annotated[
        Names,
        typer.Option(
            "--model",
            "-m",
            help="tiny-vit, ViT-B/32, ARCH:TAG, hf-hub:..., local-dir:PATH.  \\[default: tiny-vit]",
            autocompletion=complete.models,
            rich_help_panel=WHAT,
        ),
    ] = None,
    defense: Annotated[
        Names,
        typer.Option(
            "--defense",
            "-d",
            help="none, jpeg, noise:sigma=0.03, ttc+jpeg ...  \\[default: none]",
            autocompletion=complete.defenses,
            rich_help_panel=WHAT,
        ),
    ] = None,
    dataset: Annotated[
        Names,
        typer.Option(
            "--dataset",
            help="fashion, emoji:sketch, cifar10, folder:PATH, wds:PATH ...  \\[default: fashion]",
            autocompletion=complete.datasets,
            rich_help_panel=WHAT,
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Split of the data set.  \\[default: test]", rich_help_panel=WHAT)
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(help="Class-balanced, seeded subset of so many images.  \\[default: 1000]", rich_help_panel=WHAT),
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="All images of the split.", rich_help_panel=WHAT)] = False,
    classes: Annotated[
        Path | None, typer.Option(help="File of class names, one per line.", rich_help_panel=WHAT)
    ] = None,
    templates: Annotated[
        Names,
        typer.Option(
            "--template",
            help="Prompt with {c} for the class (repeat to ensemble), or 'dataset' for the set's own list.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Local weights file for the model.", rich_help_panel=WHAT)
    ] = None,
    root: Annotated[Path | None, typer.Option(help="Folder of downloaded data sets.", rich_help_panel=WHAT)] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Record and skip images that cannot be read.", rich_help_panel=WHAT)
    ] = False,
    attack: Annotated[
        Names,
        typer.Option(
            "--attack",
            "-a",
            help="pgd, fgsm, none, pgd:steps=100:loss=dlr ...  \\[default: pgd]",
            autocompletion=complete.attacks,
            rich_help_panel=HOW,
        ),
    ] = None,
    eps: Annotated[
        Names,
        typer.Option(help="Radius, 4/255 or 0.03.  \\[default: the protocol's list]", rich_help_panel=HOW),
    ] = None,
    norm: Annotated[
        str | None, typer.Option(help="linf or l2.  \\[default: the protocol's]", rich_help_panel=HOW)
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Steps of the attacks that take steps.", rich_help_panel=HOW)
    ] = None,
    attacker: Annotated[
        Names,
        typer.Option(help="transfer, whitebox, adaptive.  \\[default: all three]", rich_help_panel=HOW),
    ] = None,
    adversarial: Annotated[
        Names,
        typer.Option(help="Folders of `vlmdefend attack`: score these images, attack nothing.", rich_help_panel=HOW),
    ] = None,
    protocol: Annotated[
        str | None, typer.Option(help="Named set of choices.  \\[default: unified]", rich_help_panel=HOW)
    ] = None,
    seed: Annotated[Names, typer.Option(help="One or several.  \\[default: 0]", rich_help_panel=HOW)] = None,
    out: Annotated[Path, typer.Option(help="Run folder; the same command resumes in it.", rich_help_panel=RUN)] = Path(
        "runs"
    ),
    config: Annotated[
        Path | None, typer.Option(help="YAML file with these options; flags win.", rich_help_panel=RUN)
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Images in the model at once.  \\[default: 64]", rich_help_panel=RUN)
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1.  \\[default: the GPU if any]", rich_help_panel=RUN)
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.  \\[default: torch's]", rich_help_panel=RUN)] = None,
    plugin: Annotated[
        Names, typer.Option(help="Python file that registers attacks, defenses or data sources.", rich_help_panel=RUN)
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the cells and their cost; compute nothing.", rich_help_panel=RUN)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.", rich_help_panel=RUN)] = False,
) -> None:
    """Attack models behind defenses and print how many images survive. Every list-valued option multiplies the grid.

    [bold]vlmdefend evaluate --attack pgd[/bold] runs anywhere: the embedded model on the embedded images.
    """
    from vlmdefend.evaluation.grid import Grid, read_config
    from vlmdefend.registry import load_plugin

    settings = read_config(config) if config else {}
    from_config = settings.pop("plugin", None) or []
    for file in plugin or (from_config if isinstance(from_config, list) else [from_config]):
        load_plugin(str(file), lambda message: typer.echo(f"warning: {message}", err=True))
    given_out = ctx.get_parameter_source("out")
    if "out" in settings:
        from_file = Path(str(settings.pop("out")))
        out = out if given_out is not None and given_out.name == "COMMANDLINE" else from_file
    flags = {name: ctx.params[name] for name in Grid.model_fields if name in ctx.params}
    if flags["templates"] == ["dataset"]:
        flags["templates"] = "dataset"
    grid = Grid.build(settings, flags)

    from vlmdefend.evaluation.plan import make_plan

    plan = make_plan(grid)
    if dry_run:
        print_plan(plan)
        return
    _run(plan, out, debug=debug)


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
