"""``vlmdefend proxy-gap``: how adversarial images of each model fare with every other one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlmdefend.cli.options import complete

if TYPE_CHECKING:
    from vlmdefend.attacks.base import Attack
    from vlmdefend.data.base import ImageSet
    from vlmdefend.training.loop.results import ProxyGap


def proxy_gap(
    model: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", help="Two or more, commas or repeated.  \\[default: tiny-vit,tiny-rn]"),
    ] = None,
    target: Annotated[list[str] | None, typer.Option(help="Those that are attacked.  \\[default: every model]")] = None,
    dataset: Annotated[str, typer.Option(help="Labelled images.", autocompletion=complete.datasets)] = "fashion",
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "test",
    limit: Annotated[int, typer.Option(help="Class-balanced subset of so many images.")] = 500,
    template: Annotated[list[str] | None, typer.Option(help="Prompt with {c} for the class.")] = None,
    attack: Annotated[
        str,
        typer.Option("--attack", "-a", help="Run to its end on every image.", autocompletion=complete.attacks),
    ] = "pgd:steps=10:last=true",
    eps: Annotated[
        list[str] | None, typer.Option(help="Radius; several with commas.  \\[default: 4/255,8/255]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the attack's start.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for gap.csv and a heat map per radius.")] = Path("proxy-gap"),
    root: Annotated[Path | None, typer.Option(help="Folder of downloaded data sets.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1.  \\[default: the GPU if any]")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.  \\[default: torch's]")] = None,
    plugin: Annotated[
        list[str] | None, typer.Option(help="Python file that registers attacks or data sources.")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Measure proxy robustness (Fu et al. 2026): images crafted on one vanilla model, predicted by the others.

    Where a CLIP keeps three quarters of its clean accuracy on another one's adversarial images, it can teach that one
    with `vlmdefend distill`.
    """
    from vlmdefend.attacks import ATTACKS
    from vlmdefend.data import load_dataset
    from vlmdefend.errors import UserError
    from vlmdefend.evaluation.grid.planned import check_templates
    from vlmdefend.evaluation.store.environment import choose_device
    from vlmdefend.models.names import check_name
    from vlmdefend.registry import load_plugin
    from vlmdefend.types import parse_eps

    for file in plugin or []:
        load_plugin(file, lambda message: typer.echo(f"warning: {message}", err=True))
    models = _words(model) or ["tiny-vit", "tiny-rn"]
    targets = _words(target) or models
    models = list(dict.fromkeys([*models, *targets]))
    if len(models) < 2:
        raise UserError(f"--model {models[0]}: give at least two models; a gap is between two.")
    for name in models:
        check_name(name)
    radii = {text: parse_eps(text) for text in _words(eps) or ["4/255", "8/255"]}
    chosen = ATTACKS.create(attack)
    prompts = tuple(check_templates(template or ["a photo of a {c}."]))
    images = load_dataset(dataset, split, limit=limit, root=root)
    choose_device(device)
    if threads:
        import torch

        torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    gaps = {
        text: [_measure(name, models, images, prompts, chosen, value, seed, device) for name in targets]
        for text, value in radii.items()
    }
    for text, found in gaps.items():
        print_matrix(found, models, f"{images.name} ({split}, n = {len(images)}) · {attack} {text}")
        _draw(out, text, found, models, images, attack)
    _write_csv(out / "gap.csv", gaps, models)
    typer.echo(f"\n{out}: gap.csv and a heat map per radius.")


def _measure(
    target: str,
    models: list[str],
    images: ImageSet,
    templates: tuple[str, ...],
    attack: Attack,
    eps: float,
    seed: int,
    device: str | None,
) -> ProxyGap:
    """Images at the target's size; models of another size resize them inside."""
    from vlmdefend.data.transforms import PixelTransform
    from vlmdefend.models import load_model
    from vlmdefend.training.clip.held_out import proxy_gap as measure
    from vlmdefend.training.loop.data import TrainingImages
    from vlmdefend.types import Batch

    loaded = {name: load_model(name, device=device) for name in models}
    size, interpolation = loaded[target].image_size, loaded[target].interpolation
    batch = TrainingImages(images, PixelTransform(size, interpolation)).batch(range(len(images)))
    place = loaded[target].device
    batch = Batch(batch.ids, batch.images.to(place), batch.labels.to(place))
    pipelines = {
        name: one.zero_shot(images.class_names, templates, resize_inside=one.image_size != size)
        for name, one in loaded.items()
    }
    return measure(target, pipelines, batch, eps, seed, attack)


def print_matrix(gaps: list[ProxyGap], models: list[str], title: str) -> None:
    """Prints one row per attacked model, one column per predicting model, and the clean accuracy on top."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from vlmdefend.cli.output.distill_report import interval

    console = Console(highlight=False)
    console.print()
    console.print(Text(title, style="bold"))
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("crafted on \\ scored on", overflow="fold")
    for name in models:
        table.add_column(Text(name), overflow="fold", min_width=17)
    table.add_row("clean", *(interval(gaps[0].clean[name]) for name in models))
    for gap in gaps:
        table.add_row(Text(gap.target), *(interval(gap.adversarial[name]) for name in models))
    console.print(table)


def _draw(out: Path, eps: str, gaps: list[ProxyGap], models: list[str], images: ImageSet, attack: str) -> None:
    from vlmdefend.reporting.figures.heat_map import heat_map

    values = [
        [(gap.adversarial[name].share, f"of {100 * gap.clean[name].share:.1f} clean") for name in models]
        for gap in gaps
    ]
    title = f"Accuracy on adversarial images of another model: {images.name}, n = {len(images)}, {eps}"
    picture = heat_map(
        title, f"rows: crafted on ({attack}); columns: scored on", [g.target for g in gaps], models, values
    )
    (out / f"heat-map-{eps.replace('/', '-')}.png").write_bytes(picture)


def _write_csv(file: Path, gaps: dict[str, list[ProxyGap]], models: list[str]) -> None:
    import csv

    from vlmdefend.evaluation.statistics.intervals import wilson

    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["eps", "target", "proxy", "n", "clean", "adversarial", "low", "high", "share_kept"])
        for eps, found in gaps.items():
            for gap in found:
                for name in models:
                    clean, hit = gap.clean[name], gap.adversarial[name]
                    kept = hit.hits / clean.hits if clean.hits else ""
                    writer.writerow(
                        [eps, gap.target, name, hit.n, clean.share, hit.share, *wilson(hit.hits, hit.n), kept]
                    )


def _words(given: list[str] | None) -> list[str]:
    return list(dict.fromkeys(w.strip() for part in given or [] for w in part.split(",") if w.strip()))
