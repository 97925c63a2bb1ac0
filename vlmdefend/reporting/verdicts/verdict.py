"""Turns cells into verdict rows: an image counts as robust if it resists every attack of every attacker that was run.

So the number ``worst`` is not the lowest of the attackers' accuracies: two attackers that fool different images leave
fewer robust images together than either alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from vlmdefend.evaluation.statistics.diagnostics import (
    ATTACKERS,
    Reason,
    Result,
    attack_label,
    is_attacked,
    reasons,
)
from vlmdefend.evaluation.statistics.paired import robust_under_all
from vlmdefend.evaluation.store.records import Cell, ImageRow, Record
from vlmdefend.reporting.verdicts.attack_names import attack_names
from vlmdefend.reporting.verdicts.certified import abstained, certified_curve
from vlmdefend.reporting.verdicts.cost import per_image
from vlmdefend.reporting.verdicts.notes import notes
from vlmdefend.reporting.verdicts.row import Proportion, ScoredPipeline, VerdictRow
from vlmdefend.types import Attacker


def verdict_rows(cells: Iterable[tuple[Record, Sequence[ImageRow]]]) -> list[VerdictRow]:
    """Returns one row per (protocol, model, defense, dataset, norm, eps, seed), sorted for a table.

    Cells of another subset, other prompts, weights, protocol settings or defense options are in other rows. Cells that
    differ only in batch size or device all count, and a note mentions it. A pipeline with attack ``none`` only gets a
    row without robust accuracies; next to attacked cells it adds nothing and is left out.
    """
    results = [Result(record, rows) for record, rows in cells]
    lines: list[VerdictRow] = []
    for same in _grouped(results, lambda c: (ScoredPipeline.of(c), c.seed)).values():
        by_norm = _grouped([r for r in same if is_attacked(r.record.cell)], lambda c: c.norm)
        for attacked in by_norm.values() or [same]:
            unattacked = [] if attacked is same else [r for r in same if not is_attacked(r.record.cell)]
            found = reasons([*attacked, *unattacked])
            failed = [r for r in unattacked if r.record.status == "error"]
            lines += [_line([*at_eps, *failed], found) for at_eps in _grouped(attacked, lambda c: c.eps).values()]
    return sorted(lines, key=lambda line: line.order)


def _line(results: Sequence[Result], found: Sequence[Reason]) -> VerdictRow:
    """Returns the verdict row of the cells of one pipeline, seed, norm and radius."""
    cell = results[0].record.cell
    done = [r for r in results if r.record.status == "done"]
    failed = [r.record for r in results if r.record.status == "error"]
    attacked = [r for r in done if is_attacked(r.record.cell)]
    line = VerdictRow(
        pipeline=ScoredPipeline.of(cell),
        norm=cell.norm,
        eps=cell.eps,
        seeds=(cell.seed,),
        paradigm=next((r.record.paradigm for r in results if r.record.paradigm), ""),
        stochastic=any(r.record.stochastic for r in results),
        reasons=tuple(r for r in found if done and r.eps in (None, cell.eps)),
        errors=tuple(f"{_named(record.cell)}: {_one_line(record.error)}" for record in failed),
        batch_sizes=tuple(sorted({r.record.cell.batch_size for r in done})),
        devices=tuple(sorted({r.record.cell.device for r in done})),
        cost=per_image(done),
        attacks=attack_names(attacked),
    )
    if not done:
        return line
    ids = set.intersection(*({row.id for row in r.rows} for r in done))
    if not ids:
        return replace(line, errors=(*line.errors, "its cells share no image, so there is nothing to combine"))
    by_attacker = {a: [r for r in attacked if r.record.cell.attacker == a] for a in ATTACKERS}
    all_equal = bool(by_attacker["whitebox"]) and (line.pipeline.is_bare or all(r.record.blind for r in attacked))
    adaptive_equal = bool(by_attacker["whitebox"]) and all(r.record.adaptive_equals_whitebox for r in attacked)
    equal: list[Attacker] = ["transfer"] if all_equal else []
    equal += ["adaptive"] if all_equal or adaptive_equal else []
    return replace(
        line,
        n=len(ids),
        skipped=max(len(r.record.skipped) for r in done),
        clean=_share(clean_under_all(done), ids),
        robust={a: _share(robust_under_all(own), ids) for a, own in by_attacker.items() if own},
        worst=_share(robust_under_all(attacked), ids) if attacked else None,
        same_as_whitebox=tuple(a for a in equal if not by_attacker[a]),
        certified=certified_curve(done[0].rows),
        abstained=abstained(done[0].rows),
        notes=tuple(notes(done, ids)),
    )


def clean_under_all(results: Sequence[Result]) -> dict[str, bool]:
    """Returns image id -> whether the clean image is classified correctly in every cell."""
    right: dict[str, bool] = {}
    for result in results:
        for row in result.rows:
            right[row.id] = right.get(row.id, True) and row.clean_correct
    return right


def _share(outcome: Mapping[str, bool], ids: set[str]) -> Proportion:
    """Returns the proportion of the images ``ids`` with a positive outcome."""
    return Proportion((sum(outcome[i] for i in ids),), (len(ids),))


def _grouped(results: Iterable[Result], key: Callable[[Cell], Any]) -> dict[Any, list[Result]]:
    """Returns the results by the key of their cell."""
    groups: dict[Any, list[Result]] = {}
    for result in results:
        groups.setdefault(key(result.record.cell), []).append(result)
    return groups


def _named(cell: Cell) -> str:
    """Returns attack and attacker of a cell, for an error message."""
    return f"{attack_label(cell)} {cell.attacker}" if is_attacked(cell) else "clean images"


def _one_line(message: str | None) -> str:
    return " ".join((message or "failed without a message").split())
