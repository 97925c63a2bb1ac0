"""``vlmdefend list``: what there is to choose from, one line each."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from vlmdefend.defenses.training_time.base import StepCost
    from vlmdefend.registry import Registry

PARADIGMS = ("training-time", "test-time", "training-free")
# Of the survey that the paradigms are from (2601.12443) no list is at hand; these two are known to stand in it.
SURVEYED = ("cola", "ttc")
KINDS = ("models", "datasets", "attacks", "defenses", "methods", "adaptations", "protocols")


@dataclass(frozen=True)
class Entry:
    """One thing to choose.

    Args:
        columns: short values under the headers of the kind.
        facts: what else is known of it, by the word it is introduced with.
        note: one word behind the summary.
    """

    name: str
    summary: str
    columns: tuple[str, ...] = ()
    citation: str = ""
    note: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def about(self) -> str:
        """What it does and where it is from (a dash says that there is no source), then a line for each fact."""
        source = self.citation.strip(" -–")
        first = f"{self.summary} ({source})" if source else self.summary
        return "\n".join([f"{first}; {self.note}" if self.note else first, *map(": ".join, self.facts.items())])

    def fields(self, headers: tuple[str, ...]) -> dict[str, Any]:
        """For ``--json``; what is empty is left out."""
        told = {"name": self.name, **dict(zip(headers, self.columns, strict=True)), "summary": self.summary}
        told |= {"citation": self.citation.strip(" -–"), "note": self.note, **self.facts}
        return {key.replace(" ", "_"): value for key, value in told.items() if value}


Listed = tuple[tuple[str, ...], list[Entry]]  # the headers of the columns, and the entries


def list_names(
    kind: Annotated[
        str | None, typer.Argument(help=f"One of: {', '.join(KINDS)}.", autocompletion=lambda: list(KINDS))
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Also every ARCH:TAG of open_clip (models).")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="A list of objects in place of a table.")] = False,
    paradigm: Annotated[str | None, typer.Option(help=f"Only defenses of this one: {', '.join(PARADIGMS)}.")] = None,
    plugin: Annotated[list[str] | None, typer.Option(help="Python file that registers more of them.")] = None,
) -> None:
    """List models, datasets, attacks, defenses, methods of `train`, adaptations of `urda-train`, or protocols."""
    from vlmdefend.errors import UserError, did_you_mean
    from vlmdefend.registry import load_plugin

    for file in plugin or []:
        load_plugin(file, lambda message: typer.echo(f"warning: {message}", err=True))
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
    _show_all(plural.removesuffix("s"), listed, as_json)


def _show_all(kind: str, listed: Listed, as_json: bool) -> None:
    if as_json:
        headers, entries = listed
        typer.echo(json.dumps([entry.fields(headers) for entry in entries], indent=1, ensure_ascii=False))
    else:
        show(kind, listed)


def of_paradigm(paradigm: str) -> Listed:
    """The defenses of one paradigm, each with what makes it a member: the survey names it, or its definition fits.

    Raises:
        UnknownName: no such paradigm.
    """
    from vlmdefend.errors import did_you_mean

    wanted = paradigm.strip().lower().replace("_", "-").removesuffix(" adaptation")
    if wanted not in PARADIGMS:
        raise did_you_mean("paradigm", paradigm, list(PARADIGMS))
    headers, entries = methods() if wanted == "training-time" else defenses()
    if wanted != "training-time":
        entries = [entry for entry in entries if entry.columns[0].startswith(wanted)]

    def member(entry: Entry) -> Entry:
        known = entry.name in SURVEYED
        why = "verified: the survey 2601.12443 has it" if known else "reconstruction: by the survey's definition"
        return replace(entry, facts={**entry.facts, "membership": why})

    return headers, [member(entry) for entry in entries]


def attacks() -> Listed:
    """Every attack: the norms it is defined for, what it does, where it is from."""
    from vlmdefend.attacks import ATTACKS

    return ("norms",), [
        *(
            _entry(name, cls, trouble, (" ".join(getattr(cls, "norms", ())),))
            for name, cls, trouble in _classes(ATTACKS)
        ),
        *(
            Entry(
                f"{family}:NAME",
                f"an attack of the package {family} by its class name, such as {family}:CW",
                ("linf l2",),
            )
            for family in ATTACKS.prefixes
        ),
    ]


def methods() -> Listed:
    """Every training-time defense: the command that trains it, what it does, what trains, and what an image costs."""
    from vlmdefend.cli.train_report import trained_part
    from vlmdefend.defenses.training_time import OBJECTIVES

    entries = []
    for name, cls, trouble in _classes(OBJECTIVES):
        schedule = getattr(cls, "schedule", None)
        facts = {}
        if cls is not None:
            facts = {
                "trains": trained_part("image" if schedule is None else schedule.trains),
                "cost": _cost(cls().cost),
            }
        entries.append(_entry(name, cls, trouble, ("distill" if schedule is None else "train",), facts))
    return ("command",), sorted(entries, key=lambda entry: (entry.columns[0] != "train", entry.name))


def adaptations() -> Listed:
    """What `urda-train` knows: step 1 (adaptation) and step 2 (robustification), what each does, what it costs."""
    from vlmdefend.defenses.adaptation import ADAPTATIONS

    entries = []
    for name, cls, trouble in _classes(ADAPTATIONS):
        facts = {} if cls is None else {"cost": _cost(cls().cost)}
        entries.append(_entry(name, cls, trouble, (str(getattr(cls, "role", "")),), facts))
    return ("role",), sorted(entries, key=lambda entry: (*entry.columns, entry.name))


def defenses() -> Listed:
    """Every defense: paradigm, what it does, changes, where it is from, how it is attacked, what is known of it."""
    from vlmdefend.defenses import DEFENSES

    entries = []
    for name, cls, trouble in _classes(DEFENSES):
        recipe = getattr(cls, "recipe", "")
        facts = {
            "changes": "" if name == "none" else getattr(cls, "changes", ""),
            "adaptive attack": getattr(recipe, "text", recipe),
            "evidence": getattr(cls, "evidence", ""),
        }
        note = "random" if getattr(cls, "stochastic", False) else ""
        known = {word: text for word, text in facts.items() if text}
        entries.append(_entry(name, cls, trouble, (str(getattr(cls, "paradigm", "")),), known, note))
    return ("paradigm",), sorted(entries, key=lambda entry: (entry.name != "none", *entry.columns, entry.name))


def datasets() -> Listed:
    """Every data set: its number of classes and where its images come from."""
    from vlmdefend.data.open import listed_datasets

    return ("classes", "where"), [
        Entry(line.name, line.summary, (str(line.classes or ""), line.where)) for line in listed_datasets()
    ]


def models(everything: bool) -> Listed:
    """Every model name and form of a name; ``everything`` spells out each ``ARCH:TAG`` of open_clip (seconds)."""
    from vlmdefend.models.names import listed_models

    return ("where",), [Entry(line.name, line.summary, (line.where,)) for line in listed_models(every_pair=everything)]


def protocols() -> Listed:
    """Every protocol."""
    from vlmdefend.evaluation.grid.protocol import listed_protocols

    return (), [Entry(line.name, line.summary, citation=line.citation) for line in listed_protocols()]


def show(kind: str, listed: Listed) -> None:
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
        columns = [column.replace(" adaptation", "\nadaptation") for column in entry.columns]
        table.add_row(*(Text(_plain(text)) for text in (entry.name, *columns, entry.about)))
    Console(highlight=False).print(table)


def _classes(registry: Registry[Any]) -> Iterable[tuple[str, type[Any] | None, str]]:
    """Every name with its class; one that cannot be imported is listed with the reason and hides no other."""
    from vlmdefend.errors import UserError

    for name in registry.names():
        try:
            yield name, registry.get(name), ""
        except (ImportError, UserError) as error:
            yield name, None, f"cannot be loaded: {error}"


def _entry(
    name: str,
    cls: type[Any] | None,
    trouble: str,
    columns: tuple[str, ...],
    facts: Mapping[str, str] | None = None,
    note: str = "",
) -> Entry:
    """A class by what it says of itself, or why there is none."""
    if cls is None:
        return Entry(name, trouble, ("",) * len(columns))
    summary = getattr(cls, "summary", "") or (cls.__doc__ or "").strip().partition("\n")[0]
    return Entry(name, summary, columns, getattr(cls, "citation", ""), note, facts or {})


def _cost(cost: StepCost) -> str:
    """Of one image in one step, at the method's own options."""
    teacher = f" and {cost.teacher_forwards} of a frozen model" if cost.teacher_forwards else ""
    first = f", and {cost.once} an image before the first" if cost.once else ""
    return f"{cost.forward_backwards} forward+backwards{teacher} an image and step{first}"


def _plain(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)
