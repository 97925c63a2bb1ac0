"""What `vlmdefend list` can list: models, data sets, attacks, defenses, training methods, adaptations, protocols."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmdefend.defenses.training_time.base import StepCost
    from vlmdefend.registry import Registry

PARADIGMS = ("training-time", "test-time", "training-free")
# Of the survey that the paradigms are from (2601.12443) no list is at hand; these two are known to stand in it.
SURVEYED = ("cola", "ttc")
KINDS = ("models", "datasets", "attacks", "defenses", "methods", "adaptations", "protocols")


@dataclass(frozen=True)
class Entry:
    """One row of a list.

    Args:
        columns: short values under the headers of the kind.
        facts: further values of ``--json`` and of the column *about*, by name.
        note: one word behind the summary.
        brief: the table shows the columns alone; the rest is on the page of the entry.
    """

    name: str
    summary: str
    columns: tuple[str, ...] = ()
    citation: str = ""
    note: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    brief: bool = False

    @property
    def about(self) -> str:
        """Summary and source, then a line for each fact."""
        source = self.citation.strip(" -–")
        first = f"{self.summary} ({source})" if source else self.summary
        return "\n".join([f"{first}; {self.note}" if self.note else first, *map(": ".join, self.facts.items())])

    def fields(self, headers: tuple[str, ...]) -> dict[str, Any]:
        """Returns the entry for ``--json``; empty values are left out."""
        values = {"name": self.name, **dict(zip(headers, self.columns, strict=True)), "summary": self.summary}
        values |= {"citation": self.citation.strip(" -–"), "note": self.note, **self.facts}
        return {key.replace(" ", "_"): value for key, value in values.items() if value}


Listed = tuple[tuple[str, ...], list[Entry]]  # the headers of the columns, and the entries


def of_paradigm(paradigm: str) -> Listed:
    """Returns the defenses of one paradigm, each with the reason for its membership.

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
    """Lists every attack with its norms."""
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
    """Lists every training-time defense: its command, what it trains, its cost per image."""
    from vlmdefend.cli.output.train_report import trained_part
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
    """Lists the methods of `urda-train`: step 1 (adaptation) and step 2 (robustification), with their cost."""
    from vlmdefend.defenses.adaptation import ADAPTATIONS

    entries = []
    for name, cls, trouble in _classes(ADAPTATIONS):
        facts = {} if cls is None else {"cost": _cost(cls().cost)}
        entries.append(_entry(name, cls, trouble, (str(getattr(cls, "role", "")),), facts))
    return ("role",), sorted(entries, key=lambda entry: (*entry.columns, entry.name))


def defenses() -> Listed:
    """Lists every defense: paradigm, what it changes, worst-case accuracy measured here, kind of gradient."""
    from vlmdefend.defenses import DEFENSES
    from vlmdefend.published.evidence import evidence_on

    entries = []
    for name, cls, trouble in _classes(DEFENSES):
        evidence = evidence_on(name)
        row = evidence.worst()
        changes = "" if name == "none" else getattr(cls, "changes", "")
        recipe = getattr(cls, "recipe", "")
        found = evidence.model_dump(mode="json", exclude_defaults=True, exclude={"defense"})
        facts = {"changes": changes, "adaptive attack": getattr(recipe, "text", recipe), "evidence": found}
        paradigm = str(getattr(cls, "paradigm", ""))
        columns = (paradigm, changes, "" if row is None else f"{row.worst:.1f}", _gradient(cls, masked=evidence.masked))
        note = "random" if getattr(cls, "stochastic", False) else ""
        entry = _entry(name, cls, trouble, columns, {word: value for word, value in facts.items() if value}, note)
        entries.append(replace(entry, brief=cls is not None))
    headers = ("paradigm", "changes", "worst here", "gradient")
    return headers, sorted(entries, key=lambda entry: (entry.name != "none", entry.columns[0], entry.name))


def _gradient(cls: type[Any] | None, *, masked: bool) -> str:
    """Returns ``exact``, ``surrogate`` or ``masked``: how an adaptive attacker gets a gradient."""
    if cls is None or getattr(cls, "paradigm", "none") == "none":
        return ""
    if masked:
        return "masked"
    try:
        return "exact" if cls().adaptive_equals_whitebox else "surrogate"
    except (AttributeError, TypeError):
        return ""


def datasets() -> Listed:
    """Lists every data set: its number of classes and where its images come from."""
    from vlmdefend.data.open import listed_datasets

    return ("classes", "where"), [
        Entry(line.name, line.summary, (str(line.classes or ""), line.where)) for line in listed_datasets()
    ]


def models(everything: bool) -> Listed:
    """Lists every model name; ``everything`` spells out each ``ARCH:TAG`` of open_clip (seconds)."""
    from vlmdefend.models.names import listed_models

    return ("where",), [Entry(line.name, line.summary, (line.where,)) for line in listed_models(every_pair=everything)]


def protocols() -> Listed:
    """Lists every protocol."""
    from vlmdefend.evaluation.grid.protocol import listed_protocols

    return (), [Entry(line.name, line.summary, citation=line.citation) for line in listed_protocols()]


def _classes(registry: Registry[Any]) -> Iterable[tuple[str, type[Any] | None, str]]:
    """Yields every name with its class; one that cannot be imported comes with the reason."""
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
    facts: Mapping[str, Any] | None = None,
    note: str = "",
) -> Entry:
    """Returns the entry of a class, or of the reason why it cannot be loaded."""
    if cls is None:
        return Entry(name, trouble, ("",) * len(columns))
    summary = getattr(cls, "summary", "") or (cls.__doc__ or "").strip().partition("\n")[0]
    return Entry(name, summary, columns, getattr(cls, "citation", ""), note, facts or {})


def _cost(cost: StepCost) -> str:
    """Returns the cost of one image in one step, in words."""
    teacher = f" and {cost.teacher_forwards} of a frozen model" if cost.teacher_forwards else ""
    first = f", and {cost.once} an image before the first" if cost.once else ""
    return f"{cost.forward_backwards} forward+backwards{teacher} an image and step{first}"
