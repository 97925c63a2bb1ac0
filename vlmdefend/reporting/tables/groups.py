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
from vlmdefend.reporting.verdicts.line import ScoredPipeline, VerdictRow
from vlmdefend.reporting.verdicts.seeds import over_seeds
from vlmdefend.types import Attacker, format_eps

Word = Literal["MASKED?", "BUDGET!", "ERROR", "note"]


class Footnote(NamedTuple):
    """A sentence below a table; ``word`` is what it explains."""

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
        """The lines alone."""
        return [line for _, line in self.rows]

    def is_best(self, line: VerdictRow) -> bool:
        """Returns whether a row has the highest ``worst`` of its radius among the numbers without doubts.

        Compared are lines without a flag whose attackers are as many as any line's, and that met every attack which
        any line met: a defense that only a transfer attacker met is not better than one that an adaptive attacker met,
        nor one that only fgsm met than one that pgd met.
        """
        rivals = [rival for rival in self.lines if rival.eps == line.eps and rival.worst is not None]
        widest = max((len(rival.covered) for rival in rivals), default=0)
        attacks = {attack for rival in rivals for attack in rival.attack_set}
        fair = [
            rival
            for rival in rivals
            if not rival.flags and len(rival.covered) == widest and attacks <= set(rival.attack_set)
        ]
        best = max((rival.worst.value for rival in fair if rival.worst), default=None)
        return len(rivals) > 1 and line in fair and line.worst is not None and line.worst.value == best


def verdict_tables(lines: Sequence[VerdictRow]) -> list[VerdictTable]:
    """Returns tables in the order of the rows, seeds merged. Two protocols are never in one table."""
    merged = over_seeds(lines)
    by_place: dict[Hashable, list[VerdictRow]] = {}
    for line in merged:
        by_place.setdefault((line.pipeline.place, line.norm), []).append(line)
    return [_group(same, merged) for same in by_place.values()]


def percent(value: float | None) -> str:
    """``45.2``; ``-`` for what was not run."""
    return "-" if value is None else f"{100 * value:.1f}"


def attacker_text(line: VerdictRow, attacker: Attacker) -> str:
    """An attacker's column: a percentage, ``=`` for what equals white-box, ``-`` for what was not run."""
    if attacker in line.robust:
        return percent(line.robust[attacker].value)
    return "=" if attacker in line.same_as_whitebox else "-"


def worst_text(line: VerdictRow) -> str:
    """``45.2 [41.0, 49.5]``, over seeds ``45.2 ± 0.6``."""
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
    """``4/255``; ``-`` where only the clean images were judged."""
    return "-" if line.clean_only else format_eps(line.eps)


def passes_text(forwards: float | None, backwards: float | None) -> str:
    """``64+1``: forwards and backwards of the bare model."""
    if forwards is None or backwards is None:
        return "-"
    return f"{_short(forwards)}+{_short(backwards)}"


def ms_text(value: float | None) -> str:
    """Milliseconds or megabytes with three digits."""
    return "-" if value is None else _short(value)


def labels(
    lines: Iterable[VerdictRow], field: Callable[[ScoredPipeline], tuple[str, str]]
) -> dict[ScoredPipeline, str]:
    """A short unambiguous name per pipeline: the name, and the first digits of its hash where names collide."""
    pairs = {line.pipeline: field(line.pipeline) for line in lines}
    hashes: dict[str, set[str]] = {}
    for name, digest in pairs.values():
        hashes.setdefault(name, set()).add(digest)
    return {p: name if len(hashes[name]) == 1 else f"{name}#{digest[:6]}" for p, (name, digest) in pairs.items()}


def defense_labels(lines: Iterable[VerdictRow]) -> dict[ScoredPipeline, str]:
    """The defense's name, with the options in which its configurations differ."""
    pipelines = list(dict.fromkeys(line.pipeline for line in lines))
    configs: dict[str, list[dict[str, Any]]] = {}
    for text in sorted({(p.defense, p.defense_config) for p in pipelines}):
        configs.setdefault(text[0], []).append(json.loads(text[1]))
    return {p: " ".join([p.defense, *differing(json.loads(p.defense_config), configs[p.defense])]) for p in pipelines}


def plain(text: str) -> str:
    """Text of one line without control characters, which a name from a file may hold."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _group(lines: Sequence[VerdictRow], everything: Sequence[VerdictRow]) -> VerdictTable:
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
    """``tiny-vit on fashion (test, n = 500) · pgd steps=10 linf · protocol unified · seed 0``."""
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
    """The values of ``of`` among pipelines that share the fields ``same`` (and the number of images)."""
    alike = [
        line.pipeline
        for line in lines
        if n in (None, line.n) and all(getattr(line.pipeline, f) == getattr(first, f) for f in same)
    ]
    return {getattr(pipeline, of) for pipeline in alike}


def _footnotes(lines: Sequence[VerdictRow], names: dict[ScoredPipeline, str]) -> Iterable[Footnote]:
    """Reasons, errors, then notes; what is said of several lines is said once, with the lines it holds for."""
    said: dict[tuple[Word, str], list[VerdictRow]] = {}
    for line in lines:
        for reason in line.reasons:
            said.setdefault((reason.word, reason.text), []).append(line)
        for error in line.errors:
            said.setdefault(("ERROR", error), []).append(line)
        certified = [certified_text(line.certified, line.abstained)] if line.certified else []
        for note in [*certified, *line.notes, *_coverage(line)]:
            said.setdefault(("note", note), []).append(line)
    for differs in (
        {line: f"attacks {', '.join(line.attack_set)}" for line in lines if line.attack_set},
        {line: _seeds(line.seeds) for line in lines},
        {line: f"n = {line.n}" for line in lines if line.n},
    ):
        if len(set(differs.values())) > 1:
            for line, text in differs.items():
                said.setdefault(("note", text), []).append(line)
    order = ("MASKED?", "BUDGET!", "ERROR", "note")
    for (word, text), where in sorted(said.items(), key=lambda item: order.index(item[0][0])):
        yield Footnote(word, plain(f"{_where(where, lines, names)}: {text}"))


def _where(where: Sequence[VerdictRow], lines: Sequence[VerdictRow], names: dict[ScoredPipeline, str]) -> str:
    """``ttc 4/255, jpeg``: a defense without a radius is meant at all its radii."""
    if len(where) == len(lines) > 1:
        return "all"
    parts = []
    for pipeline, name in names.items():
        here = [eps_text(line) for line in where if line.pipeline == pipeline]
        everywhere = len(here) == sum(line.pipeline == pipeline for line in lines)
        if here:
            parts.append(name if everywhere and (len(here) > 1 or here == ["-"]) else f"{name} {', '.join(here)}")
    return "; ".join(parts)


def _coverage(line: VerdictRow) -> Iterable[str]:
    missing = [a for a in ATTACKERS if a not in line.covered]
    if line.worst is not None and missing:
        yield f"worst does not cover the {' and '.join(missing)} attacker{'s' if len(missing) > 1 else ''}"


def _seeds(seeds: Sequence[int]) -> str:
    return ("seed " if len(seeds) == 1 else "seeds ") + ", ".join(map(str, seeds))


def _short(value: float) -> str:
    """Three digits, no exponent for anything a cost can be."""
    if value >= 100 or value == round(value):
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}".rstrip("0").rstrip(".") or "0"
