"""``vlmdefend attack``: crafts a set of adversarial images, saves it losslessly, draws a contact sheet."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlmdefend.cli.options.common import RUN, Debug, resumable
from vlmdefend.cli.options.grid_options import Config, DryRun, Plugin, make_grid, read_file
from vlmdefend.cli.options.parameters import options_of
from vlmdefend.evaluation.grid.grid import Grid

if TYPE_CHECKING:
    from vlmdefend.evaluation.adversarial_sets.crafting import CraftedSet
    from vlmdefend.evaluation.grid.planned import Plan


@options_of(Grid, single=True)
def attack(
    given: dict[str, Any],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the set, needed; the same command resumes in it.", rich_help_panel=RUN),
    ] = None,
    png: Annotated[
        bool,
        typer.Option("--png", help="Also 8-bit PNG files inside the budget, judged as they are.", rich_help_panel=RUN),
    ] = False,
    config: Config = None,
    plugin: Plugin = None,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Craft adversarial images of one model, alone or behind a defense, check them and save them to the bit.

    [bold]vlmdefend evaluate --adversarial OUT --model A,B[/bold] scores any models on them.
    """
    from vlmdefend.errors import UserError

    settings = read_file(config)
    folder, also_png = settings.pop("out", None), settings.pop("png", False)
    if not isinstance(also_png, bool):
        raise UserError(f"--config {config}: has png: {also_png!r}; write true or false.")
    if "adversarial" in settings:
        raise UserError(f"--config {config}: adversarial is an option of `vlmdefend evaluate`; leave it out.")
    grid = make_grid(given, {"attacker": "adaptive"} | settings, plugin)

    from vlmdefend.evaluation.adversarial_sets.crafting import check_plan
    from vlmdefend.evaluation.make_plan import make_plan

    plan = make_plan(grid)
    check_plan(plan)
    if dry_run:
        from vlmdefend.cli.evaluate import print_plan

        print_plan(plan)
        return
    if out is None and not folder:
        raise UserError("--out: is missing; give the folder of the set, which is created if needed.")
    _run(plan, out or Path(str(folder)), png=png or also_png)


def _run(plan: Plan, out: Path, *, png: bool) -> None:
    """Crafts the set, draws its contact sheet, prints what it holds."""
    from vlmdefend.cli.output.progress import show_progress
    from vlmdefend.cli.output.progress_text import GridText
    from vlmdefend.evaluation.adversarial_sets.crafting import craft_set
    from vlmdefend.evaluation.adversarial_sets.set_format import SHEET, write_whole
    from vlmdefend.evaluation.store.run_folder import disk
    from vlmdefend.reporting.figures.contact_sheet import contact_sheet

    with resumable(out, "done"):
        with show_progress(GridText(plan)) as progress:
            crafted = craft_set(plan, out, progress, png=png)
        sheet = crafted.saved.folder / SHEET
        if not sheet.exists() and (content := contact_sheet(crafted)) is not None:
            with disk(sheet):
                write_whole(sheet, content)
    _print_verdict(crafted, sheet)


def _print_verdict(crafted: CraftedSet, sheet: Path) -> None:
    """Prints what the set holds; names from data are wrapped, never cut."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from vlmdefend.evaluation.statistics.intervals import wilson
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
