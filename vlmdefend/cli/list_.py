"""``vlmdefend list``: names to choose from, one line each; ``list KIND NAME``: the page of one."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from vlmdefend.cli.options.common import load_plugins
from vlmdefend.cli.output.listings import (
    KINDS,
    PARADIGMS,
    Listed,
    adaptations,
    attacks,
    datasets,
    defenses,
    methods,
    models,
    of_paradigm,
    protocols,
)

FOOTNOTE = (
    "worst here: percent of fashion images that tiny-rn keeps under every attacker, PGD-10 at 4/255. gradient: exact "
    "(autograd sees it all), surrogate (an adaptive attacker differentiates a surrogate or a mean over draws), masked "
    "(autograd gives a gradient that hides the weakness). `vlmdefend list defenses NAME` shows the whole of one."
)


def list_names(
    kind: Annotated[
        str | None, typer.Argument(help=f"One of: {', '.join(KINDS)}.", autocompletion=lambda: list(KINDS))
    ] = None,
    name: Annotated[str | None, typer.Argument(help="One of the list: prints the whole of it.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Also every ARCH:TAG of open_clip (models).")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="A list of objects in place of a table.")] = False,
    paradigm: Annotated[str | None, typer.Option(help=f"Only defenses of this one: {', '.join(PARADIGMS)}.")] = None,
    plugin: Annotated[list[str] | None, typer.Option(help="Python file that registers more of them.")] = None,
) -> None:
    """List models, datasets, attacks, defenses, methods of `train`, adaptations of `urda-train`, or protocols.

    With a name, print the whole of one: options with defaults, recipe, citation, evidence.
    """
    from vlmdefend.errors import UserError, did_you_mean

    load_plugins(plugin)
    if paradigm is not None and kind is None:
        kind = "defenses"
    if kind is None:
        raise UserError(f"say what to list: vlmdefend list {'|'.join(KINDS)}.")
    plural = kind.strip().lower()
    plural = plural if plural.endswith("s") else f"{plural}s"
    if plural not in KINDS:
        raise did_you_mean("kind of list", kind, list(KINDS))
    if paradigm is not None:
        if plural != "defenses":
            raise UserError(f"--paradigm {paradigm}: {plural} have none; it goes with defenses.")
        if name is not None:
            raise UserError(f"--paradigm {paradigm}: lists many; leave it out to print the whole of {name}.")
        return _show_all("defense", of_paradigm(paradigm), as_json)
    listed: Listed = {
        "models": lambda: models(everything),
        "datasets": datasets,
        "attacks": attacks,
        "defenses": defenses,
        "methods": methods,
        "adaptations": adaptations,
        "protocols": protocols,
    }[plural]()
    if name is not None:
        from vlmdefend.cli.output.detail import show_one

        return show_one(plural, name, listed, as_json=as_json)
    _show_all(plural.removesuffix("s"), listed, as_json)


def _show_all(kind: str, listed: Listed, as_json: bool) -> None:
    if as_json:
        headers, entries = listed
        typer.echo(json.dumps([entry.fields(headers) for entry in entries], indent=1, ensure_ascii=False))
    else:
        show(kind, listed)


def show(kind: str, listed: Listed) -> None:
    """Prints a table no wider than the terminal; only the last column wraps, names are never cut."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    headers, entries = listed
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    longest = max((len(entry.name) for entry in entries), default=0)
    table.add_column(kind, no_wrap=longest <= 28, overflow="fold", min_width=min(longest, 28))
    for header in headers:
        table.add_column(header)
    brief = all(entry.brief for entry in entries)
    if not brief:
        table.add_column("about", overflow="fold", min_width=24)
    for entry in entries:
        columns = [column.removesuffix(" adaptation") for column in entry.columns]
        about = [] if brief else [entry.about if not entry.brief else entry.summary]
        table.add_row(*(Text(_plain(text)) for text in (entry.name, *columns, *about)))
    console = Console(highlight=False)
    console.print(table)
    if brief and entries:
        console.print(f"\n{FOOTNOTE}", markup=False)


def _plain(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)
