"""Compares two sets of records image by image: images lost and won, exact sign test. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import count
from typing import Literal, NamedTuple

from vlmdefend.errors import UserError
from vlmdefend.evaluation.statistics.diagnostics import Result, attack_label, is_attacked, reasons
from vlmdefend.evaluation.statistics.paired import robust_under_all, sign_test
from vlmdefend.evaluation.store.records import Cell
from vlmdefend.reporting.verdicts.verdict import clean_under_all
from vlmdefend.types import format_eps

Measure = Literal["clean", "worst"]
ROUNDING = 1e-9  # 29 % of 100 images is 28.999999999999996


class NotComparable(UserError):
    """The two sets of records were not made in the same way."""

    exit_code = 3


class ComparedSetting(NamedTuple):
    """The fields that both sides must share: data, attack, defense, radius, seed."""

    protocol: str
    protocol_hash: str
    dataset: str
    split: str
    ids_hash: str
    images_hash: str
    prompts_hash: str
    defense: str
    defense_config: str  # JSON with sorted keys
    norm: str
    eps: float
    seed: int
    model: str  # "" if each side has one model, whose names may then differ

    @property
    def defended(self) -> str:
        """Returns ``jpeg 4/255``."""
        return f"{self.defense} {format_eps(self.eps)}" if self.eps else self.defense

    @property
    def order(self) -> tuple[object, ...]:
        """The sort key of a row: no defense first, then by name; radii ascending."""
        return self.dataset, self.model, self.norm, self.defense != "none", self.defense, self.defense_config, self[-3:]


@dataclass(frozen=True)
class PairedCounts:
    """Images lost and won by one measure (clean or worst) between before and after, with the p-value.

    ``p``: the probability of at least so many losses among the changed images if losses and gains were equally likely
    (exact one-sided sign test, as McNemar's), corrected for the number of comparisons (Holm 1979).
    """

    n: int
    before: int  # images right (clean) or robust (worst)
    after: int
    lost: int
    won: int
    p: float

    @classmethod
    def of(cls, ids: Set[str], before: Mapping[str, bool], after: Mapping[str, bool]) -> PairedCounts:
        """Returns the counts over outcomes by image id; ``p`` is not corrected yet."""
        lost = sum(before[i] and not after[i] for i in ids)
        won = sum(after[i] and not before[i] for i in ids)
        right = [sum(side[i] for i in ids) for side in (before, after)]
        return cls(len(ids), right[0], right[1], lost, won, sign_test(lost, won))

    def fell(self, tolerance: float, alpha: float) -> bool:
        """Returns whether more than ``tolerance`` (a share, 0..1) was lost, beyond chance."""
        return self.lost - self.won > tolerance * self.n + ROUNDING and self.p < alpha


@dataclass(frozen=True)
class Comparison:
    """The comparison of one defense at one radius and seed. ``worst`` is None where nothing was attacked."""

    setting: ComparedSetting
    models: tuple[str, str]  # before, after
    clean: PairedCounts
    worst: PairedCounts | None
    doubts: tuple[str, ...] = ()  # reasons to distrust the new number that the old one did not have

    @property
    def measures(self) -> dict[Measure, PairedCounts]:
        """The clean measure and, where attacks were run, the worst case."""
        return {"clean": self.clean, "worst": self.worst} if self.worst else {"clean": self.clean}

    def regressions(self, tolerance: float, alpha: float) -> list[Measure]:
        """Returns the measures that fell by more than ``tolerance`` with p < ``alpha``."""
        return [name for name, paired in self.measures.items() if paired.fell(tolerance, alpha)]


def compare(before: Sequence[Result], after: Sequence[Result]) -> list[Comparison]:
    """Compares every setting of ``before`` with the same setting of ``after``, which may hold more.

    Weights, code, device and batch size may differ, since they are the subject of the comparison. If each side has one
    model, its name may differ too.

    Raises:
        NotComparable: a cell failed, or a setting has no counterpart, other attacks, other images, or occurs twice on
            one side.
    """
    by_model = any(len({r.record.cell.model for r in side}) > 1 for side in (before, after))
    old, new = _by_setting(before, by_model), _by_setting(after, by_model)
    found = []
    for setting, own in old.items():
        if setting not in new:
            raise NotComparable(_missing(setting, new))
        sides = own, new[setting]
        _check_attacks(setting, *sides)
        ids = _images(setting, *sides)
        clean = PairedCounts.of(ids, *map(clean_under_all, sides))
        attacked = [[r for r in side if is_attacked(r.record.cell)] for side in sides]
        worst = PairedCounts.of(ids, *map(robust_under_all, attacked)) if all(attacked) else None
        known = _doubts(old, setting)
        fresh = tuple(text for kind, text in _doubts(new, setting).items() if kind not in known)
        models = (own[0].record.cell.model, new[setting][0].record.cell.model)
        found.append(Comparison(setting, models, clean, worst, fresh))
    return _corrected(sorted(found, key=lambda c: c.setting.order))


def _by_setting(results: Iterable[Result], by_model: bool) -> dict[ComparedSetting, list[Result]]:
    groups: dict[ComparedSetting, list[Result]] = {}
    for result in results:
        cell = result.record.cell
        if result.record.status != "done":
            raise NotComparable(f"{cell.title()}: failed ({result.record.error}); run it again first.")
        groups.setdefault(_setting(cell, by_model), []).append(result)
    return groups


def _setting(cell: Cell, by_model: bool) -> ComparedSetting:
    same = {name: getattr(cell, name) for name in ComparedSetting._fields if name not in ("defense_config", "model")}
    config = json.dumps(cell.defense_config, sort_keys=True)
    return ComparedSetting(**same, defense_config=config, model=cell.model if by_model else "")


def _missing(setting: ComparedSetting, others: Iterable[ComparedSetting]) -> str:
    """Returns the fields in which the nearest setting of the other side differs."""

    def apart(other: ComparedSetting) -> list[str]:
        return [n for n, a, b in zip(ComparedSetting._fields, setting, other, strict=True) if a != b]

    nearest = min((apart(other) for other in others), key=len)
    return (
        f"{setting.defended} on {setting.dataset}: the second set of records has no counterpart (the nearest differs "
        f"in {', '.join(nearest)}); run the same `vlmdefend evaluate` command for both."
    )


def _images(setting: ComparedSetting, before: Sequence[Result], after: Sequence[Result]) -> Set[str]:
    """Returns the ids of the images, the same on both sides."""
    old, new = (
        frozenset.intersection(*(frozenset(row.id for row in r.rows) for r in side)) for side in (before, after)
    )
    if old != new or not old:
        raise NotComparable(
            f"{setting.defended}: the runs cover different images ({len(old)} and {len(new)}, {len(old & new)} in "
            "both); give both the same images, and no --skip-bad."
        )
    return old


def _check_attacks(setting: ComparedSetting, before: Sequence[Result], after: Sequence[Result]) -> None:
    """Raises an error if the two sides were attacked differently."""

    def attacks(results: Sequence[Result]) -> dict[str, str]:
        cells = [r.record.cell for r in results]
        return {
            json.dumps([c.attacker, c.attack, c.attack_config], sort_keys=True): f"{attack_label(c)} {c.attacker}"
            for c in cells
        }

    for side, results in (("first", before), ("second", after)):
        if len(attacks(results)) < len(results):
            raise NotComparable(
                f"{setting.defended}: the {side} set of records holds an attack twice, of other weights, code, batch "
                "size or machine; give each run a folder of its own (--out)."
            )
    old, new = attacks(before), attacks(after)
    if apart := old.keys() ^ new.keys():
        side, name = ("first", old) if min(apart) in old else ("second", new)
        raise NotComparable(
            f"{setting.defended}: only the {side} set of records was attacked by {name[min(apart)]} with these "
            "options; run the same `vlmdefend evaluate` command for both."
        )


def _doubts(groups: Mapping[ComparedSetting, Sequence[Result]], setting: ComparedSetting) -> dict[str, str]:
    """Returns kind and sentence of every reason to doubt the numbers of a setting."""
    pipeline = [r for other, own in groups.items() if other._replace(eps=setting.eps) == setting for r in own]
    found = [reason for reason in reasons(pipeline) if reason.eps in (None, setting.eps)]
    return {reason.kind: f"{reason.word} {reason.text}" for reason in found}


def needed(comparisons: Sequence[Comparison], tolerance: float, alpha: float) -> int:
    """Returns the smallest number of lost images, with none won, that counts as a regression."""
    smallest = min(paired.n for c in comparisons for paired in c.measures.values())
    tests = len(_hypotheses(comparisons))
    return next(k for k in count(1) if sign_test(k, 0) * tests < alpha and k > tolerance * smallest + ROUNDING)


def _hypotheses(comparisons: Sequence[Comparison]) -> dict[tuple[object, ...], list[tuple[int, Measure]]]:
    """Returns the tested hypotheses, each with its comparisons; clean accuracy is one hypothesis for all radii."""
    tested: dict[tuple[object, ...], list[tuple[int, Measure]]] = {}
    for i, comparison in enumerate(comparisons):
        for name, paired in comparison.measures.items():
            setting = comparison.setting
            about = setting._replace(eps=0.0, norm="") if name == "clean" else setting
            tested.setdefault((name, about, replace(paired, p=0.0)), []).append((i, name))
    return tested


def _corrected(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Applies Holm's step-down correction over all hypotheses."""

    def p(places: list[tuple[int, Measure]]) -> float:
        i, name = places[0]
        return comparisons[i].measures[name].p

    ordered = sorted(_hypotheses(comparisons).values(), key=p)
    corrected = list(comparisons)
    highest = 0.0
    for rank, places in enumerate(ordered):
        highest = max(highest, min(1.0, (len(ordered) - rank) * p(places)))
        for i, name in places:
            better = replace(comparisons[i].measures[name], p=highest)
            corrected[i] = (
                replace(corrected[i], clean=better) if name == "clean" else replace(corrected[i], worst=better)
            )
    return corrected
