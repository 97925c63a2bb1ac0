"""Cells to verdict lines: per image, the AND over every attack of every attacker that was run.

The headline ``worst`` is not the lowest of the attackers' accuracies: two attackers that break different images leave
fewer standing together than either alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vlmdefend.evaluation.diagnostics import (
    ATTACKERS,
    Reason,
    Result,
    attack_label,
    is_attacked,
    reasons,
    robust_under_all,
)
from vlmdefend.evaluation.records import Attacker, Cell, Record, Row
from vlmdefend.evaluation.rejection import rejection_text
from vlmdefend.evaluation.statistics import mean_and_spread, wilson
from vlmdefend.reporting.certified import abstained, certified_curve, mean_curve
from vlmdefend.reporting.cost import PerImage, mean_cost, per_image


@dataclass(frozen=True)
class Share:
    """A proportion of n images, for one seed or several."""

    counts: tuple[int, ...]
    ns: tuple[int, ...]

    @property
    def value(self) -> float:
        """The mean over seeds, 0..1."""
        return mean_and_spread(self._values())[0]

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds; None for one seed."""
        return mean_and_spread(self._values())[1]

    @property
    def interval(self) -> tuple[float, float] | None:
        """Wilson 95 % interval; None for several seeds, which share their images and are no independent draws."""
        return wilson(self.counts[0], self.ns[0]) if len(self.counts) == 1 else None

    def _values(self) -> list[float]:
        return [count / n for count, n in zip(self.counts, self.ns, strict=True)]


@dataclass(frozen=True)
class Pipeline:
    """What was scored, on what: the fields that two cells share if their rows may be combined."""

    protocol: str
    protocol_hash: str
    model: str
    weights_hash: str
    dataset: str
    split: str
    ids_hash: str
    prompts_hash: str
    defense: str
    defense_config: str  # JSON with sorted keys

    @classmethod
    def of(cls, cell: Cell) -> Pipeline:
        """The pipeline of a cell."""
        same = {name: getattr(cell, name) for name in cls.__dataclass_fields__ if name != "defense_config"}
        return cls(**same, defense_config=json.dumps(cell.defense_config, sort_keys=True))

    @property
    def is_bare(self) -> bool:
        """No defense: the three attackers are one."""
        return self.defense == "none"


@dataclass(frozen=True, eq=False)
class Line:
    """The verdict on one pipeline at one radius, for one seed (or several, after :func:`over_seeds`)."""

    pipeline: Pipeline
    norm: str
    eps: float
    seeds: tuple[int, ...]
    paradigm: str = ""
    stochastic: bool = False
    n: int = 0
    skipped: int = 0
    clean: Share | None = None  # None: every cell failed
    robust: Mapping[Attacker, Share] = field(default_factory=dict)  # attackers that were run
    worst: Share | None = None  # None: nothing was attacked
    same_as_whitebox: tuple[Attacker, ...] = ()  # not run, because equal to white-box
    certified: Mapping[float, float] = field(default_factory=dict)  # L2 radius -> accuracy, where the defense certifies
    abstained: float = 0.0  # share of clean images without an answer
    attacks: Mapping[Attacker, tuple[str, ...]] = field(default_factory=dict)
    reasons: tuple[Reason, ...] = ()
    notes: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()
    batch_sizes: tuple[int, ...] = ()
    devices: tuple[str, ...] = ()
    cost: PerImage = field(default_factory=PerImage)

    @property
    def clean_only(self) -> bool:
        """Only attack ``none`` was run."""
        return self.clean is not None and self.worst is None and not self.errors

    @property
    def attack_set(self) -> tuple[str, ...]:
        """Labels of all attacks, each once."""
        return tuple(dict.fromkeys(label for labels in self.attacks.values() for label in labels))

    @property
    def flags(self) -> tuple[str, ...]:
        """``MASKED?``, ``BUDGET!``, ``ERROR``: each at most once."""
        return tuple(dict.fromkeys([*(r.word for r in self.reasons), *(["ERROR"] if self.errors else [])]))

    @property
    def covered(self) -> frozenset[Attacker]:
        """The attackers that ``worst`` speaks for."""
        return frozenset(self.robust) | frozenset(self.same_as_whitebox)


def verdict_lines(cells: Iterable[tuple[Record, Sequence[Row]]]) -> list[Line]:
    """One line per (protocol, model, defense, dataset, norm, eps, seed), sorted for a table.

    Cells of another subset, other prompts, weights, protocol settings or defense options are other lines. Cells that
    differ only in batch size or device all count, and a note says so. A pipeline with attack ``none`` only gets a line
    without robust accuracies; next to attacked cells it adds nothing and is left out.
    """
    results = [Result(record, rows) for record, rows in cells]
    lines: list[Line] = []
    for same in _grouped(results, lambda c: (Pipeline.of(c), c.seed)).values():
        by_norm = _grouped([r for r in same if is_attacked(r.record.cell)], lambda c: c.norm)
        for attacked in by_norm.values() or [same]:
            unattacked = [] if attacked is same else [r for r in same if not is_attacked(r.record.cell)]
            found = reasons([*attacked, *unattacked])
            failed = [r for r in unattacked if r.record.status == "error"]
            lines += [_line([*at_eps, *failed], found) for at_eps in _grouped(attacked, lambda c: c.eps).values()]
    return sorted(lines, key=_order)


def over_seeds(lines: Sequence[Line]) -> list[Line]:
    """Lines that differ only in the seed become one, with mean and spread."""
    merged: dict[tuple[Any, ...], list[Line]] = {}
    for line in lines:
        merged.setdefault((line.pipeline, line.norm, line.eps, line.clean_only), []).append(line)
    return sorted((_merge(same) for same in merged.values()), key=_order)


def _line(results: Sequence[Result], found: Sequence[Reason]) -> Line:
    """The verdict on cells of one pipeline, seed, norm and radius."""
    cell = results[0].record.cell
    done = [r for r in results if r.record.status == "done"]
    failed = [r.record for r in results if r.record.status == "error"]
    attacked = [r for r in done if is_attacked(r.record.cell)]
    line = Line(
        pipeline=Pipeline.of(cell),
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
        attacks=_attacks(attacked),
    )
    if not done:
        return line
    ids = set.intersection(*({row.id for row in r.rows} for r in done))
    if not ids:
        return replace(line, errors=(*line.errors, "its cells share no image, so there is nothing to combine"))
    by_attacker = {a: [r for r in attacked if r.record.cell.attacker == a] for a in ATTACKERS}
    all_are_one = bool(by_attacker["whitebox"]) and (line.pipeline.is_bare or all(r.record.blind for r in attacked))
    whitebox_says_all = bool(by_attacker["whitebox"]) and all(r.record.adaptive_equals_whitebox for r in attacked)
    equal: list[Attacker] = ["transfer"] if all_are_one else []
    equal += ["adaptive"] if all_are_one or whitebox_says_all else []
    return replace(
        line,
        n=len(ids),
        skipped=max(len(r.record.skipped) for r in done),
        clean=_share(_clean_under_all(done), ids),
        robust={a: _share(robust_under_all(own), ids) for a, own in by_attacker.items() if own},
        worst=_share(robust_under_all(attacked), ids) if attacked else None,
        same_as_whitebox=tuple(a for a in equal if not by_attacker[a]),
        certified=certified_curve(done[0].rows),
        abstained=abstained(done[0].rows),
        notes=tuple(_notes(done, ids)),
    )


def _notes(results: Sequence[Result], ids: set[str]) -> Iterable[str]:
    """What a reader must know about how these cells were combined."""
    sizes = sorted({len(r.rows) for r in results})
    if any(len(r.rows) != len(ids) for r in results):
        span = f"{sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else f"{sizes[0]}"
        yield f"its cells cover different images ({span}); the numbers are over the {len(ids)} that all of them have"
    if skipped := max(len(r.record.skipped) for r in results):
        yield f"{skipped} unreadable image{'s' if skipped > 1 else ''} left out"
    for name, word in (("batch_size", "batch sizes"), ("device", "devices")):
        values = sorted({getattr(r.record.cell, name) for r in results})
        if len(values) > 1:
            yield f"cells of several {word} ({', '.join(map(str, values))}) all count"
    for result in results:
        text = rejection_text(result.rows) if is_attacked(result.record.cell) else ""
        prompts = result.record.attacked_prompts[:1]
        for said in filter(None, (text, *(f"its prompts became {prompt!r} and the like" for prompt in prompts))):
            yield f"{result.record.cell.attacker} {attack_label(result.record.cell)}: {said}"
    keys = [r.record.key for r in results]
    if again := len(keys) - len(set(keys)):
        yield f"{again} of its cells came out differently when computed again; every outcome counts"
    predictions: dict[str, set[int]] = {}
    for result in results:
        for row in result.rows:
            predictions.setdefault(row.id, set()).add(row.clean_prediction)
    if differ := sum(len(seen) > 1 for seen in predictions.values()):
        yield f"clean predictions of {differ} images differ between its cells; clean counts those always right"


def _merge(lines: Sequence[Line]) -> Line:
    """Seeds of one pipeline at one radius."""
    if len(lines) == 1:
        return lines[0]
    ordered = sorted(lines, key=lambda line: line.seeds)
    first = ordered[0]
    judged = [line for line in ordered if line.clean is not None]
    robust = {
        attacker: _joined([line.robust[attacker] for line in judged if attacker in line.robust])
        for attacker in ATTACKERS
        if any(attacker in line.robust for line in judged)
    }
    notes = [note for line in ordered for note in line.notes]
    for attacker, share in robust.items():
        if len(share.counts) < len(ordered):
            notes.append(f"{attacker} was run for {len(share.counts)} of {len(ordered)} seeds")
    worst = [line.worst for line in judged if line.worst is not None]
    return replace(
        first,
        seeds=tuple(seed for line in ordered for seed in line.seeds),
        paradigm=next((line.paradigm for line in ordered if line.paradigm), ""),
        stochastic=any(line.stochastic for line in ordered),
        n=min((line.n for line in judged), default=0),
        skipped=max(line.skipped for line in ordered),
        clean=_joined([line.clean for line in judged if line.clean is not None]) if judged else None,
        robust=robust,
        worst=_joined(worst) if worst else None,
        same_as_whitebox=tuple(a for a in ATTACKERS if all(a in line.same_as_whitebox for line in judged) and judged),
        attacks={a: _union(line.attacks.get(a, ()) for line in ordered) for a in ATTACKERS if a in robust},
        reasons=_merged_reasons(ordered),
        certified=mean_curve(line.certified for line in judged),
        abstained=mean_and_spread([line.abstained for line in judged])[0] if judged else 0.0,
        notes=tuple(dict.fromkeys(notes)),
        errors=tuple(f"seed {line.seeds[0]}: {error}" for line in ordered for error in line.errors),
        batch_sizes=tuple(sorted({size for line in ordered for size in line.batch_sizes})),
        devices=tuple(sorted({device for line in ordered for device in line.devices})),
        cost=mean_cost([line.cost for line in judged]),
    )


def _merged_reasons(lines: Sequence[Line]) -> tuple[Reason, ...]:
    """Each kind of reason once, in the words of its first seed, with the number of seeds that have it."""
    by_kind: dict[tuple[str, str, float | None], list[Reason]] = {}
    for line in lines:
        for reason in line.reasons:
            by_kind.setdefault((reason.word, reason.kind, reason.eps), []).append(reason)
    return tuple(
        replace(same[0], text=f"{same[0].text} (like this in {len(same)} of {len(lines)} seeds)")
        for same in by_kind.values()
    )


def _attacks(results: Sequence[Result]) -> dict[Attacker, tuple[str, ...]]:
    """Per attacker the labels of its attacks; options are spelled out only where two configurations share a label."""
    configs: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        same = configs.setdefault(attack_label(result.record.cell), [])
        if result.record.cell.attack_config not in same:
            same.append(result.record.cell.attack_config)
    labels: dict[Attacker, tuple[str, ...]] = {}
    for attacker in ATTACKERS:
        own = [r.record.cell for r in results if r.record.cell.attacker == attacker]
        if own:
            spelled = (" ".join([attack_label(c), *differing(c.attack_config, configs[attack_label(c)])]) for c in own)
            labels[attacker] = tuple(sorted(set(spelled)))
    return labels


def differing(config: Mapping[str, Any], among: Sequence[Mapping[str, Any]]) -> list[str]:
    """``key=value`` for the options in which these configurations differ."""
    keys = sorted({key for c in among for key in c})
    apart = [k for k in keys if any(c.get(k) != among[0].get(k) for c in among)]
    return [f"{k}={config.get(k)}" for k in apart]


def _clean_under_all(results: Sequence[Result]) -> dict[str, bool]:
    """Image id -> right on the clean image in every cell."""
    right: dict[str, bool] = {}
    for result in results:
        for row in result.rows:
            right[row.id] = right.get(row.id, True) and row.clean_correct
    return right


def _share(outcome: Mapping[str, bool], ids: set[str]) -> Share:
    return Share((sum(outcome[i] for i in ids),), (len(ids),))


def _joined(shares: Sequence[Share]) -> Share:
    return Share(tuple(c for s in shares for c in s.counts), tuple(n for s in shares for n in s.ns))


def _union(labels: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(sorted({label for some in labels for label in some}))


def _grouped(results: Iterable[Result], key: Callable[[Cell], Any]) -> dict[Any, list[Result]]:
    groups: dict[Any, list[Result]] = {}
    for result in results:
        groups.setdefault(key(result.record.cell), []).append(result)
    return groups


def _order(line: Line) -> tuple[Any, ...]:
    p = line.pipeline
    place = (p.protocol, p.protocol_hash, p.model, p.weights_hash, p.dataset, p.split, p.ids_hash, p.prompts_hash)
    return (*place, line.norm, not p.is_bare, p.defense, p.defense_config, line.eps, line.seeds)


def _named(cell: Cell) -> str:
    return f"{attack_label(cell)} {cell.attacker}" if is_attacked(cell) else "clean images"


def _one_line(message: str | None) -> str:
    return " ".join((message or "failed without a message").split())
