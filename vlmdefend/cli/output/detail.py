"""``vlmdefend list KIND NAME``: all that is known of one attack, defense, method, data set, model or protocol."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

import typer

from vlmdefend.errors import did_you_mean

if TYPE_CHECKING:
    from vlmdefend.cli.output.listings import Entry, Listed
    from vlmdefend.published.evidence import Evidence, PaperClaim
    from vlmdefend.registry import Registry

Section = tuple[str, list[str]]  # a heading and its lines


def show_one(kind: str, name: str, listed: Listed, *, as_json: bool) -> None:
    """Prints one entry of a list: summary, columns, options with defaults, docstring, recipe, evidence.

    Raises:
        UnknownName: with the nearest names of the list.
    """
    headers, entries = listed
    wanted = name.strip().lower().replace("_", "-")
    entry = next((one for one in entries if one.name.lower().replace("_", "-") == wanted), None)
    if entry is None:
        raise did_you_mean(kind.removesuffix("s"), name, [one.name for one in entries])
    if as_json:
        typer.echo(json.dumps(entry.fields(headers), indent=1, ensure_ascii=False))
        return
    print_page(entry.name, list(_sections(kind, entry, headers)))


def print_page(title: str, sections: list[Section]) -> None:
    """Prints headings and wrapped lines, no wider than the terminal."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console(highlight=False)
    console.print(Text(title, style="bold"))
    for heading, lines in sections:
        console.print(Text(f"\n{heading}", style="bold"))
        for line in lines:
            text = "".join(c if c.isprintable() else "?" for c in line)
            console.print(Padding(Text(text, overflow="fold"), (0, 0, 0, 2)))


def _sections(kind: str, entry: Entry, headers: tuple[str, ...]) -> Iterator[Section]:
    """The headings of a page, in order; those without content are left out."""
    source = entry.citation.strip(" -–")
    columns = [f"{header}: {value}" for header, value in zip(headers, entry.columns, strict=True) if value]
    about = [entry.summary, *([f"source: {source}"] if source else []), *([entry.note] if entry.note else [])]
    yield "What it is", about + columns
    cls = _class_of(kind, entry.name)
    if cls is not None:
        if options := list(_options(cls)):
            yield "Options", options
        if text := inspect.getdoc(cls):
            yield "Description", _reflowed(text)
    facts = {name: value for name, value in entry.facts.items() if name not in ("evidence", *headers)}
    if facts:
        yield "Facts", [f"{name}: {value}" for name, value in facts.items()]
    if kind == "protocols":
        yield "Choices", _protocol(entry.name)
    if kind == "defenses":
        from vlmdefend.published.evidence import evidence_on

        yield from _evidence(evidence_on(entry.name))


def _class_of(kind: str, name: str) -> type[Any] | None:
    """The class of a registered method; None for kinds that are no classes, and for a class that cannot be loaded."""
    from vlmdefend.attacks import ATTACKS
    from vlmdefend.defenses import DEFENSES
    from vlmdefend.defenses.adaptation import ADAPTATIONS
    from vlmdefend.defenses.training_time import OBJECTIVES
    from vlmdefend.errors import UserError

    registries: dict[str, Registry[Any]] = {
        "attacks": ATTACKS,
        "defenses": DEFENSES,
        "methods": OBJECTIVES,
        "adaptations": ADAPTATIONS,
    }
    try:
        return registries[kind].get(name) if kind in registries else None
    except (ImportError, UserError):
        return None


def _options(cls: type[Any]) -> Iterator[str]:
    """One line per option: how it is written, and its default."""
    for option in fields(cls):
        default = option.default if option.default is not MISSING else "(required)"
        if option.default_factory is not MISSING:
            default = option.default_factory()
        shown = f"{default:.6g}" if isinstance(default, float) else str(default)
        yield f"{option.name}={shown}   ({str(option.type).replace('Annotated', '').strip()})"


def _reflowed(text: str) -> list[str]:
    """The lines of a docstring, each paragraph and each item of a list on one line; items stay indented."""
    lines: list[str] = []
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        before = lines[-1] if lines else ""
        continues = before.strip() and line.strip() and not before.endswith(":")
        if continues and (indent == 0 == len(before) - len(before.lstrip()) or indent >= 8):
            lines[-1] = f"{before} {line.strip()}"
        else:
            lines.append(line)
    return lines


def _protocol(name: str) -> list[str]:
    from vlmdefend.evaluation.grid.protocol import get_protocol

    return [f"{key}: {value}" for key, value in get_protocol(name).model_dump(mode="json").items()]


def _evidence(evidence: Evidence) -> Iterator[Section]:
    """What papers report, what was measured here, what it is worth."""
    if evidence.finding:
        yield "Worth", [evidence.finding]
    if evidence.papers:
        yield "Published", [_claim(claim) for claim in evidence.papers]
    if evidence.measured:
        rows = []
        for row in evidence.measured:
            numbers = {"transfer": row.transfer, "whitebox": row.whitebox, "adaptive": row.adaptive}
            parts = [f"{name} {value:.1f}" for name, value in numbers.items() if value is not None]
            masked = " (whitebox: MASKED?)" if row.masked else ""
            what = f"{row.model} on {row.dataset} (n = {row.n}), {row.attack} {row.norm} {row.eps}"
            worst = f"worst {row.worst:.1f} [{row.low:.1f}, {row.high:.1f}] %{masked}"
            rows.append(f"{what}: clean {row.clean:.1f}, {', '.join([*parts, worst])}; {row.passes} passes")
        yield "Measured here", rows
    if evidence.notes:
        yield "Further measurements", list(evidence.notes)


def _claim(claim: PaperClaim) -> str:
    where = ", ".join(filter(None, (claim.model, claim.eps and f"at {claim.eps}", claim.attacker)))
    value = " to ".join(f"{number:g}" for number in claim.robust)
    number = f": {value} % robust" if value else ""
    return f"{claim.statement}{f' ({where})' if where else ''}{number} [{claim.label}: {claim.source}]"
