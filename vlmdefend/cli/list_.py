"""``vlmdefend list``: what there is to choose from, one line each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

if TYPE_CHECKING:
    from vlmdefend.registry import Registry

KINDS = ("models", "datasets", "attacks", "defenses", "adaptations", "protocols")


class Entry(NamedTuple):
    """One line: the name, short columns, and the sentence that may wrap."""

    name: str
    columns: tuple[str, ...]
    about: str


def list_names(
    kind: Annotated[
        str | None, typer.Argument(help=f"One of: {', '.join(KINDS)}.", autocompletion=lambda: list(KINDS))
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Also every ARCH:TAG of open_clip (models).")] = False,
    plugin: Annotated[list[str] | None, typer.Option(help="Python file that registers more of them.")] = None,
) -> None:
    """List models, datasets, attacks, defenses, adaptations or protocols."""
    from vlmdefend.errors import UserError, did_you_mean
    from vlmdefend.registry import load_plugin

    for file in plugin or []:
        load_plugin(file, lambda message: typer.echo(f"warning: {message}", err=True))
    if kind is None:
        raise UserError(f"say what to list: vlmdefend list {'|'.join(KINDS)}.")
    plural = kind.strip().lower()
    plural = plural if plural.endswith("s") else f"{plural}s"
    if plural not in KINDS:
        raise did_you_mean("kind of list", kind, list(KINDS))
    entries = {
        "models": lambda: models(everything),
        "datasets": datasets,
        "attacks": attacks,
        "defenses": defenses,
        "adaptations": adaptations,
        "protocols": protocols,
    }[plural]()
    show(plural.removesuffix("s"), entries)


def attacks() -> tuple[tuple[str, ...], list[Entry]]:
    """Every attack: the norms it is defined for, what it does, where it is from."""
    from vlmdefend.attacks import ATTACKS

    return ("norms",), [
        Entry(name, (" ".join(getattr(cls, "norms", ())),), _sentence(cls)) if cls else Entry(name, ("",), trouble)
        for name, cls, trouble in _classes(ATTACKS)
    ] + [
        Entry(
            f"{family}:NAME", ("linf l2",), f"an attack of the package {family} by its class name, such as {family}:CW"
        )
        for family in ATTACKS.families
    ]


def adaptations() -> tuple[tuple[str, ...], list[Entry]]:
    """What `urda-train` knows: step 1 (adaptation) and step 2 (robustification), what each does, where it is from."""
    from vlmdefend.defenses.adaptation import ADAPTATIONS

    entries = [
        Entry(name, (str(getattr(cls, "role", "")),), _sentence(cls)) if cls else Entry(name, ("",), trouble)
        for name, cls, trouble in _classes(ADAPTATIONS)
    ]
    return ("role",), sorted(entries, key=lambda entry: (*entry.columns, entry.name))


def defenses() -> tuple[tuple[str, ...], list[Entry]]:
    """Every defense: paradigm, what it does, changes, where it is from, how it is attacked, what is known of it."""
    from vlmdefend.defenses import DEFENSES

    entries = []
    for name, cls, trouble in _classes(DEFENSES):
        if cls is None:
            entries.append(Entry(name, ("",), trouble))
            continue
        recipe = getattr(cls, "recipe", "")
        changes = "" if name == "none" else getattr(cls, "changes", "")
        lines = [_sentence(cls) + ("; random" if getattr(cls, "stochastic", False) else "")]
        lines += [f"changes: {changes}"] if changes else []
        lines += [f"adaptive attack: {getattr(recipe, 'text', recipe)}"] if recipe else []
        lines += [f"evidence: {cls.evidence}"] if getattr(cls, "evidence", "") else []
        paradigm = str(getattr(cls, "paradigm", ""))
        entries.append(Entry(name, (paradigm.replace(" adaptation", "\nadaptation"),), "\n".join(lines)))
    return ("paradigm",), sorted(entries, key=lambda entry: (entry.name != "none", *entry.columns, entry.name))


def datasets() -> tuple[tuple[str, ...], list[Entry]]:
    """Every data set: its number of classes and where its images come from."""
    from vlmdefend.data.open import listed_datasets

    return ("classes", "where"), [
        Entry(line.name, (str(line.classes or ""), line.where), line.summary) for line in listed_datasets()
    ]


def models(everything: bool) -> tuple[tuple[str, ...], list[Entry]]:
    """Every model name and form of a name; ``everything`` spells out each ``ARCH:TAG`` of open_clip (seconds)."""
    from vlmdefend.models.names import listed_models

    lines = listed_models(every_pair=everything)
    return ("where",), [Entry(line.name, (line.where,), line.summary) for line in lines]


def protocols() -> tuple[tuple[str, ...], list[Entry]]:
    """Every protocol."""
    from vlmdefend.evaluation.protocol import listed_protocols

    entries = []
    for protocol in listed_protocols():
        entries.append(Entry(protocol.name, (), _cited(protocol.summary, protocol.citation)))
    return (), entries


def show(kind: str, listed: tuple[tuple[str, ...], list[Entry]]) -> None:
    """Print a table no wider than the terminal; only the last column wraps, names are never cut."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    headers, entries = listed
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    longest = max((len(entry.name) for entry in entries), default=0)
    table.add_column(kind, no_wrap=longest <= 28, overflow="fold", min_width=min(longest, 28))
    for header in headers:
        table.add_column(header)
    table.add_column("about", overflow="fold", min_width=24)
    for entry in entries:
        table.add_row(*(Text(_plain(text)) for text in (entry.name, *entry.columns, entry.about)))
    Console(highlight=False).print(table)


def _classes(registry: Registry[Any]) -> Iterable[tuple[str, type[Any] | None, str]]:
    """Every name with its class; one that cannot be imported is listed with the reason and hides no other."""
    from vlmdefend.errors import UserError

    for name in registry.names():
        try:
            yield name, registry.get(name), ""
        except (ImportError, UserError) as error:
            yield name, None, f"cannot be loaded: {error}"


def _sentence(cls: type[Any]) -> str:
    """What it does and where it is from."""
    summary = getattr(cls, "summary", "") or (cls.__doc__ or "").strip().partition("\n")[0]
    return _cited(summary, getattr(cls, "citation", ""))


def _cited(summary: str, citation: str) -> str:
    """A citation in brackets; a dash says that there is none."""
    source = citation.strip(" -–")
    return f"{summary} ({source})" if source else summary


def _plain(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)
