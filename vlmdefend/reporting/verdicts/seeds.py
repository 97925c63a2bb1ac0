"""Merges verdict rows of several seeds: mean and spread of every number, and each doubt with its number of seeds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from vlmdefend.evaluation.statistics.diagnostics import ATTACKERS, Reason
from vlmdefend.evaluation.statistics.intervals import mean_and_spread
from vlmdefend.reporting.verdicts.certified import mean_curve
from vlmdefend.reporting.verdicts.cost import mean_cost
from vlmdefend.reporting.verdicts.row import Proportion, VerdictRow


def over_seeds(lines: Sequence[VerdictRow]) -> list[VerdictRow]:
    """Merges rows that differ only in the seed into one row with mean and spread."""
    merged: dict[tuple[Any, ...], list[VerdictRow]] = {}
    for line in lines:
        merged.setdefault((line.pipeline, line.norm, line.eps, line.clean_only), []).append(line)
    return sorted((_merge(same) for same in merged.values()), key=lambda line: line.order)


def _merge(lines: Sequence[VerdictRow]) -> VerdictRow:
    """Returns one row for the rows of all seeds of one pipeline at one radius."""
    if len(lines) == 1:
        return lines[0]
    ordered = sorted(lines, key=lambda line: line.seeds)
    first = ordered[0]
    scored = [line for line in ordered if line.clean is not None]
    robust = {
        attacker: _joined([line.robust[attacker] for line in scored if attacker in line.robust])
        for attacker in ATTACKERS
        if any(attacker in line.robust for line in scored)
    }
    notes = [note for line in ordered for note in line.notes]
    for attacker, share in robust.items():
        if len(share.counts) < len(ordered):
            notes.append(f"{attacker} was run for {len(share.counts)} of {len(ordered)} seeds")
    worst = [line.worst for line in scored if line.worst is not None]
    return replace(
        first,
        seeds=tuple(seed for line in ordered for seed in line.seeds),
        paradigm=next((line.paradigm for line in ordered if line.paradigm), ""),
        stochastic=any(line.stochastic for line in ordered),
        n=min((line.n for line in scored), default=0),
        skipped=max(line.skipped for line in ordered),
        clean=_joined([line.clean for line in scored if line.clean is not None]) if scored else None,
        robust=robust,
        worst=_joined(worst) if worst else None,
        same_as_whitebox=tuple(a for a in ATTACKERS if all(a in line.same_as_whitebox for line in scored) and scored),
        attacks={a: _union(line.attacks.get(a, ()) for line in ordered) for a in ATTACKERS if a in robust},
        reasons=_merged_reasons(ordered),
        certified=mean_curve(line.certified for line in scored),
        abstained=mean_and_spread([line.abstained for line in scored])[0] if scored else 0.0,
        notes=tuple(dict.fromkeys(notes)),
        errors=tuple(f"seed {line.seeds[0]}: {error}" for line in ordered for error in line.errors),
        batch_sizes=tuple(sorted({size for line in ordered for size in line.batch_sizes})),
        devices=tuple(sorted({device for line in ordered for device in line.devices})),
        cost=mean_cost([line.cost for line in scored]),
    )


def _merged_reasons(lines: Sequence[VerdictRow]) -> tuple[Reason, ...]:
    """Returns each kind of reason once, with the text of its first seed and the number of seeds that have it."""
    by_kind: dict[tuple[str, str, float | None], list[Reason]] = {}
    for line in lines:
        for reason in line.reasons:
            by_kind.setdefault((reason.word, reason.kind, reason.eps), []).append(reason)
    return tuple(
        replace(same[0], text=f"{same[0].text} (like this in {len(same)} of {len(lines)} seeds)")
        for same in by_kind.values()
    )


def _joined(shares: Sequence[Proportion]) -> Proportion:
    return Proportion(tuple(c for s in shares for c in s.counts), tuple(n for s in shares for n in s.ns))


def _union(labels: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(sorted({label for some in labels for label in some}))
