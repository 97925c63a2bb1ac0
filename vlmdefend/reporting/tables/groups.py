"""Arranges verdict rows into tables of text: one per model and data set under one protocol."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from vlmdefend.evaluation.statistics.diagnostics import ATTACKERS
from vlmdefend.reporting.verdicts.attack_names import differing
from vlmdefend.reporting.verdicts.certified import certified_text
from vlmdefend.reporting.verdicts.cost import PerImage, mean_cost
from vlmdefend.reporting.verdicts.row import ScoredPipeline, VerdictRow
from vlmdefend.reporting.verdicts.seeds import over_seeds
from vlmdefend.types import Attacker, format_eps

Word = Literal["MASKED?", "BUDGET!", "ERROR", "note"]


class Footnote(NamedTuple):
    """A sentence below a table; ``word`` is the flag that it explains, or ``note``."""

    word: Word
    text: str


class CostRow(NamedTuple):
    """The cost of one defense of a table, over its radii and seeds."""

    defense: str
    paradigm: str
    cost: PerImage


@dataclass(frozen=True)
class VerdictTable:
    """The content of one table. ``rows`` pairs each verdict row with the name of its defense."""

    title: str
    rows: tuple[tuple[str, VerdictRow], ...]
    costs: tuple[CostRow, ...]
    footnotes: tuple[Footnote, ...]

    @property
    def lines(self) -> list[VerdictRow]:
        """The verdict rows without the names of their defenses."""
        return [line for _, line in self.rows]

    def is_best(self, line: VerdictRow) -> bool:
        """Returns whether a row has the highest ``worst`` of its radius among the numbers without doubts.

        Only rows without a flag are compared, and only those that were run with every attack and the most attackers of
        any row of the radius: a defense attacked by transfer only is not better than one attacked adaptively, nor one
        attacked by fgsm only than one attacked by pgd.
        """
        others = [other for other in self.lines if other.eps == line.eps and other.worst is not None]
        widest = max((len(other.covered) for other in others), default=0)
        attacks = {attack for other in others for attack in other.attack_set}
        comparable = [
            other
            for other in others
            if not other.flags and len(other.covered) == widest and attacks <= set(other.attack_set)
        ]
        best = max((other.worst.value for other in comparable if other.worst), default=None)
        return len(others) > 1 and line in comparable and line.worst is not None and line.worst.value == best


def verdict_tables(lines: Sequence[VerdictRow]) -> list[VerdictTable]:
    """Returns tables in the order of the rows, seeds merged. Two protocols are never in one table."""
    merged = over_seeds(lines)
    by_place: dict[Hashable, list[VerdictRow]] = {}
    for line in merged:
        by_place.setdefault((line.pipeline.place, line.norm), []).append(line)
    return [_table_of(same, merged) for same in by_place.values()]


def percent(value: float | None) -> str:
    """Formats a share as ``45.2``; None as ``-``."""
    return "-" if value is None else f"{100 * value:.1f}"


def attacker_text(line: VerdictRow, attacker: Attacker) -> str:
    """Returns an attacker's cell: a percentage, ``=`` if it equals white-box, ``-`` if it was not run."""
    if attacker in line.robust:
        return percent(line.robust[attacker].value)
    return "=" if attacker in line.same_as_whitebox else "-"


def worst_text(line: VerdictRow) -> str:
    """Returns the worst case as ``45.2 [41.0, 49.5]``, over several seeds as ``45.2 ± 0.6``."""
    share = line.worst
    if share is None:
        return "-"
    if share.interval is not None:
        low, high = share.interval
        return f"{percent(share.value)} [{percent(low)}, {percent(high)}]"
    return f"{percent(share.value)} ± {percent(share.spread)}"


def worst_header(lines: Iterable[VerdictRow]) -> str:
    """Returns the header of the worst column: Wilson interval, standard deviation over seeds, or both."""
    shares = [line.worst for line in lines if line.worst is not None]
    shown = ["[95 %]"] if any(share.interval for share in shares) else []
    shown += ["±std"] if any(share.spread is not None for share in shares) else []
    return " ".join(["worst", *shown])


def clean_text(line: VerdictRow) -> str:
    """Returns the clean accuracy as text."""
    return percent(line.clean.value if line.clean else None)


def eps_text(line: VerdictRow) -> str:
    """Returns the radius as ``4/255``; ``-`` where only clean images were predicted."""
    return "-" if line.clean_only else format_eps(line.eps)


def passes_text(forwards: float | None, backwards: float | None) -> str:
    """Returns forwards and backwards of the bare model as ``64+1``."""
    if forwards is None or backwards is None:
        return "-"
    return f"{_short(forwards)}+{_short(backwards)}"


def ms_text(value: float | None) -> str:
    """Formats milliseconds or megabytes with three digits; None as ``-``."""
    return "-" if value is None else _short(value)


def labels(
    lines: Iterable[VerdictRow], field: Callable[[ScoredPipeline], tuple[str, str]]
) -> dict[ScoredPipeline, str]:
    """Returns a short unique label per pipeline: the name, and the first digits of its hash where names collide."""
    pairs = {line.pipeline: field(line.pipeline) for line in lines}
    hashes: dict[str, set[str]] = {}
    for name, digest in pairs.values():
        hashes.setdefault(name, set()).add(digest)
    return {p: name if len(hashes[name]) == 1 else f"{name}#{digest[:6]}" for p, (name, digest) in pairs.items()}


def defense_labels(lines: Iterable[VerdictRow]) -> dict[ScoredPipeline, str]:
    """Returns per pipeline the defense's name, with the options in which its configurations differ."""
    pipelines = list(dict.fromkeys(line.pipeline for line in lines))
    configs: dict[str, list[dict[str, Any]]] = {}
    for text in sorted({(p.defense, p.defense_config) for p in pipelines}):
        configs.setdefault(text[0], []).append(json.loads(text[1]))
    return {p: " ".join([p.defense, *differing(json.loads(p.defense_config), configs[p.defense])]) for p in pipelines}


def plain(text: str) -> str:
    """Replaces control characters, which a name from a file may contain, by question marks."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _table_of(lines: Sequence[VerdictRow], everything: Sequence[VerdictRow]) -> VerdictTable:
    """Returns the table of these rows; ``everything`` holds the rows of all tables, for unique titles."""
    names = {pipeline: plain(text) for pipeline, text in defense_labels(lines).items()}
    costs = []
    for pipeline, label in names.items():
        own = [line for line in lines if line.pipeline == pipeline and line.clean is not None]
        if own:
            costs.append(CostRow(label, own[0].paradigm, mean_cost([line.cost for line in own])))
    return VerdictTable(
        title=plain(_title(lines, everything)),
        rows=tuple((names[line.pipeline], line) for line in lines),
        costs=tuple(costs),
        footnotes=tuple(_footnotes(lines, names)),
    )


def _title(lines: Sequence[VerdictRow], everything: Sequence[VerdictRow]) -> str:
    """Returns a title: ``tiny-vit on fashion (test, n = 500) · pgd steps=10 linf · protocol unified · seed 0``."""
    first = lines[0].pipeline
    model = labels(everything, lambda p: (p.model, p.weights_hash))[first]
    protocol = labels(everything, lambda p: (p.protocol, p.protocol_hash))[first]
    n = max(line.n for line in lines)
    subset = ""
    if len(_others(first, everything, "dataset", "split", of="ids_hash", n=n)) > 1:
        subset = f", images #{first.ids_hash[:6]}"
    if len(_others(first, everything, "protocol_hash", "model", "dataset", "split", of="prompts_hash")) > 1:
        subset += f", prompts #{first.prompts_hash[:6]}"
    attacks = {line.attack_set for line in lines if line.attack_set}
    if len(attacks) == 1:
        attack = f"{', '.join(*attacks)} {lines[0].norm}"
    else:
        attack = f"{lines[0].norm}, attacks below" if attacks else "clean images"
    seeds = {line.seeds for line in lines}
    return " · ".join(
        [
            f"{model} on {first.dataset} ({first.split}, n = {n}{subset})",
            attack,
            f"protocol {protocol}",
            _seeds(*seeds) if len(seeds) == 1 else "seeds below",
        ]
    )


def _others(first: ScoredPipeline, lines: Sequence[VerdictRow], *same: str, of: str, n: int | None = None) -> set[str]:
    """Returns the values of field ``of`` among pipelines that share the fields ``same`` (and the number of images)."""
    alike = [
        line.pipeline
        for line in lines
        if n in (None, line.n) and all(getattr(line.pipeline, f) == getattr(first, f) for f in same)
    ]
    return {getattr(pipeline, of) for pipeline in alike}


def _footnotes(lines: Sequence[VerdictRow], names: dict[ScoredPipeline, str]) -> Iterable[Footnote]:
    """Yields reasons, errors, then notes; a text that several rows share is printed once, with their names."""
    texts: dict[tuple[Word, str], list[VerdictRow]] = {}
    for line in lines:
        for reason in line.reasons:
            texts.setdefault((reason.word, reason.text), []).append(line)
        for error in line.errors:
            texts.setdefault(("ERROR", error), []).append(line)
        certified = [certified_text(line.certified, line.abstained)] if line.certified else []
        for note in [*certified, *line.notes, *_coverage(line)]:
            texts.setdefault(("note", note), []).append(line)
    for differs in (
        {line: f"attacks {', '.join(line.attack_set)}" for line in lines if line.attack_set},
        {line: _seeds(line.seeds) for line in lines},
        {line: f"n = {line.n}" for line in lines if line.n},
    ):
        if len(set(differs.values())) > 1:
            for line, text in differs.items():
                texts.setdefault(("note", text), []).append(line)
    order = ("MASKED?", "BUDGET!", "ERROR", "note")
    for (word, text), where in sorted(texts.items(), key=lambda item: order.index(item[0][0])):
        yield Footnote(word, plain(f"{_where(where, lines, names)}: {text}"))


def _where(where: Sequence[VerdictRow], lines: Sequence[VerdictRow], names: dict[ScoredPipeline, str]) -> str:
    """Returns the rows of a footnote as ``ttc 4/255; jpeg``: without a radius, all radii of the defense are meant."""
    if len(where) == len(lines) > 1:
        return "all"
    parts = []
    for pipeline, name in names.items():
        here = [eps_text(line) for line in where if line.pipeline == pipeline]
        at_all_radii = len(here) == sum(line.pipeline == pipeline for line in lines)
        if here:
            parts.append(name if at_all_radii and (len(here) > 1 or here == ["-"]) else f"{name} {', '.join(here)}")
    return "; ".join(parts)


def _coverage(line: VerdictRow) -> Iterable[str]:
    """Yields a note if ``worst`` does not include every attacker."""
    missing = [a for a in ATTACKERS if a not in line.covered]
    if line.worst is not None and missing:
        yield f"worst does not cover the {' and '.join(missing)} attacker{'s' if len(missing) > 1 else ''}"


def _seeds(seeds: Sequence[int]) -> str:
    return ("seed " if len(seeds) == 1 else "seeds ") + ", ".join(map(str, seeds))


def _short(value: float) -> str:
    """Formats a number with three digits and without an exponent."""
    if value >= 100 or value == round(value):
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}".rstrip("0").rstrip(".") or "0"
