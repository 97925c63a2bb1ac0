"""``vlmdefend attack``: craft a set of adversarial images, save it losslessly, show it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlmdefend.cli import complete

if TYPE_CHECKING:
    from vlmdefend.evaluation.crafting import Crafted
    from vlmdefend.evaluation.plan import Plan

WHAT, HOW, RUN = "What to attack", "How to attack", "How to run"


def attack(
    ctx: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder of the set; the same command resumes in it.", rich_help_panel=RUN)],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="tiny-vit, ViT-B/32, ARCH:TAG, hf-hub:..., local-dir:PATH.  \\[default: tiny-vit]",
            autocompletion=complete.models,
            rich_help_panel=WHAT,
        ),
    ] = None,
    defense: Annotated[
        str | None,
        typer.Option(
            "--defense",
            "-d",
            help="none, jpeg, noise:sigma=0.03, ttc+jpeg ...  \\[default: none]",
            autocompletion=complete.defenses,
            rich_help_panel=WHAT,
        ),
    ] = None,
    dataset: Annotated[
        str | None,
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
        list[str] | None,
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
        str | None,
        typer.Option(
            "--attack",
            "-a",
            help="pgd, fgsm, pgd:steps=100:loss=dlr ...  \\[default: pgd]",
            autocompletion=complete.attacks,
            rich_help_panel=HOW,
        ),
    ] = None,
    eps: Annotated[str | None, typer.Option(help="Radius, 4/255 or 0.03.", rich_help_panel=HOW)] = None,
    norm: Annotated[
        str | None, typer.Option(help="linf or l2.  \\[default: the protocol's]", rich_help_panel=HOW)
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps, if the attack takes steps.", rich_help_panel=HOW)] = None,
    attacker: Annotated[
        str | None,
        typer.Option(help="transfer, whitebox, adaptive.  \\[default: adaptive]", rich_help_panel=HOW),
    ] = None,
    protocol: Annotated[
        str | None, typer.Option(help="Named set of choices.  \\[default: unified]", rich_help_panel=HOW)
    ] = None,
    seed: Annotated[str | None, typer.Option(help="\\[default: 0]", rich_help_panel=HOW)] = None,
    png: Annotated[
        bool,
        typer.Option("--png", help="Also 8-bit PNG files inside the budget, judged as they are.", rich_help_panel=RUN),
    ] = False,
    batch_size: Annotated[
        int | None, typer.Option(help="Images in the model at once.  \\[default: 64]", rich_help_panel=RUN)
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1.  \\[default: the GPU if any]", rich_help_panel=RUN)
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.  \\[default: torch's]", rich_help_panel=RUN)] = None,
    plugin: Annotated[
        list[str] | None,
        typer.Option(help="Python file that registers attacks, defenses or data sources.", rich_help_panel=RUN),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the cost; compute nothing.", rich_help_panel=RUN)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.", rich_help_panel=RUN)] = False,
) -> None:
    """Craft adversarial images of one model, alone or behind a defense, check them and save them to the bit.

    [bold]vlmdefend evaluate --adversarial OUT --model A,B[/bold] scores any models on them.
    """
    from vlmdefend.evaluation.grid import Grid
    from vlmdefend.registry import load_plugin

    for file in plugin or []:
        load_plugin(file, lambda message: typer.echo(f"warning: {message}", err=True))
    flags = {name: ctx.params[name] for name in Grid.model_fields if name in ctx.params}
    if flags["templates"] == ["dataset"]:
        flags["templates"] = "dataset"
    grid = Grid.build({"attacker": "adaptive"}, flags)

    from vlmdefend.evaluation.crafting import check_plan
    from vlmdefend.evaluation.plan import make_plan

    plan = make_plan(grid)
    check_plan(plan)
    if dry_run:
        from vlmdefend.cli.evaluate import print_plan

        print_plan(plan)
        return
    _run(plan, out, png=png)


def _run(plan: Plan, out: Path, *, png: bool) -> None:
    from vlmdefend.cli.progress import progress_listener
    from vlmdefend.evaluation.crafting import craft_set
    from vlmdefend.evaluation.set_format import SHEET, write_whole
    from vlmdefend.evaluation.store import disk
    from vlmdefend.reporting.contact_sheet import contact_sheet

    try:
        with progress_listener(plan) as listener:
            crafted = craft_set(plan, out, listener, png=png)
        sheet = crafted.saved.folder / SHEET
        if not sheet.exists() and (content := contact_sheet(crafted)) is not None:
            with disk(sheet):
                write_whole(sheet, content)
    except KeyboardInterrupt:
        typer.echo(f"interrupted; what is done is kept in {out}, the same command goes on from there.", err=True)
        raise typer.Exit(130) from None
    _print_verdict(crafted, sheet)


def _print_verdict(crafted: Crafted, sheet: Path) -> None:
    """A few lines; names of people's own are wrapped, never cut."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from vlmdefend.evaluation.statistics import wilson
    from vlmdefend.types import format_eps

    manifest, folder = crafted.saved.manifest, crafted.saved.folder
    cell, n, right = manifest.cell, manifest.n, manifest.clean_correct
    robust = right - manifest.fooled
    low, high = wilson(robust, n)
    exact = f" = {cell.eps:.6g}" if "/" in format_eps(cell.eps) else ""
    size = sum(file.size for file in manifest.images) / 1e6
    lines = [
        ("set", f"{manifest.source} on {cell.dataset} ({cell.split}, n = {n}), {cell.attacker}, seed {cell.seed}"),
        ("clean", f"{right} of {n} right ({100 * right / n:.1f} %)"),
        (
            "fooled",
            f"{manifest.fooled} of {right}; {100 * robust / n:.1f} % [{100 * low:.1f}, {100 * high:.1f}] robust",
        ),
        (
            "budget",
            f"{cell.norm} {format_eps(cell.eps)}{exact}; largest distance {manifest.largest_distance:.6g}",
        ),
        (
            "files",
            f"{folder}: images in {len(manifest.images)} files (float32, {size:.1f} MB), index.jsonl, manifest.json",
        ),
    ]
    if outside := crafted.record.checks.outside_budget:
        lines.insert(4, ("BUDGET!", f"the attack left the budget on {outside} images; these were put back"))
    if skipped := len(crafted.record.skipped):
        lines.insert(1, ("skipped", f"{skipped} images that cannot be read"))
    if crafted.pngs is not None:
        pngs = crafted.pngs
        lines.append(
            (
                "png",
                f"{folder / 'png'}: {pngs.n} files, {pngs.fooled} fooled (float32: {manifest.fooled}), {pngs.outside} "
                f"outside the budget, largest distance {pngs.largest_distance:.6g}",
            )
        )
    lines.append(("picture", str(sheet) if sheet.exists() else "none: the model was right on no image"))
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    table.add_column("", no_wrap=True, style="bold")
    table.add_column("", overflow="fold")
    for name, text in lines:
        table.add_row(name, Text("".join(c if c.isprintable() else "?" for c in text)))
    console = Console(highlight=False)
    console.print(table)
    done = "found done. " if crafted.reused else ""
    console.print(f"\n{done}Score others on it: vlmdefend evaluate --adversarial {folder} --model ...", markup=False)
