"""Prints the results of saved sets on models: attacked pipelines in the rows, scored pipelines in the columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from vlmdefend.evaluation.statistics.diagnostics import Result
from vlmdefend.evaluation.statistics.intervals import wilson
from vlmdefend.evaluation.store.records import Cell, ImageRow, Record
from vlmdefend.reporting.tables.groups import percent, plain
from vlmdefend.reporting.verdicts.attack_names import differing
from vlmdefend.types import format_eps

if TYPE_CHECKING:
    from rich.console import Console

PER_TABLE = 3  # columns that fit beside the name of a set in 80 characters


def print_transfer(cells: Iterable[tuple[Record, Sequence[ImageRow]]], console: Console | None = None) -> None:
    """Prints robust accuracy with its Wilson interval for every saved set and target; clean accuracy in the first row.

    An image whose clean version the target misclassifies counts as not robust. An image that the attacked model
    misclassified was not attacked, so it counts as robust if the target classifies it correctly; a line below the table
    gives the number of these images.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console()
    results = [Result(record, rows) for record, rows in cells]
    groups: dict[tuple[str, ...], list[Result]] = {}
    for result in results:
        cell = result.record.cell
        groups.setdefault((cell.protocol, cell.dataset, cell.split, cell.ids_hash, cell.norm), []).append(result)
    for place, same in groups.items():
        protocol, dataset, split, _, norm = place
        n = max(result.record.n for result in same)
        title = f"saved images of {dataset} ({split}, n = {n}) · {norm} · protocol {protocol}"
        console.print(Text(plain(title), style="bold"), highlight=False)
        names = _targets([result.record.cell for result in same])
        targets = list(dict.fromkeys(names.values()))
        rows = _sources([result.record.cell for result in same])
        by_place = {(rows[r.record.key], names[r.record.key]): r.record for r in same}
        clean = {names[r.record.key]: percent(r.record.clean_correct / r.record.n) for r in same}
        sources = list(dict.fromkeys(rows.values()))
        for first in range(0, len(targets), PER_TABLE):
            shown = targets[first : first + PER_TABLE]
            if first:
                console.print()
            table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
            table.add_column("crafted on \\ scored on", overflow="fold")
            for target in shown:
                table.add_column(Text(plain(target)), overflow="fold", min_width=17)
            table.add_row("clean", *(clean[target] for target in shown))
            for source in sources:
                table.add_row(Text(plain(source)), *(_robust(by_place.get((source, target))) for target in shown))
            console.print(table, highlight=False)
        if alone := _not_attacked(same, rows):
            console.print(Text(plain(f"wrong when clean, so not attacked: {alone}")), highlight=False)


def _not_attacked(results: Sequence[Result], names: dict[str, str]) -> str:
    """Returns ``8 images of tiny-vit:pgd:steps=10 4/255, ...`` for the sets with images that were not attacked."""
    counts = {
        names[result.record.key]: result.record.n - result.record.cell.attack_config["source_attacked"]
        for result in results
        if "source_attacked" in result.record.cell.attack_config
    }
    return ", ".join(f"{count} image{'s' if count > 1 else ''} of {name}" for name, count in counts.items() if count)


def _sources(cells: Sequence[Cell]) -> dict[str, str]:
    """Returns cell key -> ``tiny-vit:pgd:steps=10 4/255``, with the hash of the set where two names are equal."""
    sets = {
        cell.key: (f"{cell.attack_config['source']} {format_eps(cell.eps)}", cell.attack_config["set"])
        for cell in cells
    }
    alike = [name for name, _ in set(sets.values())]
    return {key: name if alike.count(name) == 1 else f"{name} #{digest[:6]}" for key, (name, digest) in sets.items()}


def _targets(cells: Sequence[Cell]) -> dict[str, str]:
    """Returns cell key -> model, defense, and the options and seed that distinguish two targets."""
    seeds = len({cell.seed for cell in cells}) > 1
    names = {}
    for cell in cells:
        defense = [] if cell.defense == "none" else [f"+ {cell.defense}"]
        configs = [other.defense_config for other in cells if other.defense == cell.defense]
        seed = [f"seed {cell.seed}"] if seeds else []
        names[cell.key] = " ".join([cell.model, *defense, *differing(cell.defense_config, configs), *seed])
    return names


def _robust(record: Record | None) -> str:
    if record is None:
        return "-"
    low, high = wilson(record.robust, record.n)
    return f"{percent(record.robust / record.n)} [{percent(low)}, {percent(high)}]"
