"""Names attacks in a table: by label, with options only where two configurations share a label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlmdefend.evaluation.statistics.diagnostics import ATTACKERS, Result, attack_label
from vlmdefend.types import Attacker


def attack_names(results: Sequence[Result]) -> dict[Attacker, tuple[str, ...]]:
    """Returns per attacker the labels of its attacks, with options only where two configurations share a label."""
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
    """Returns ``key=value`` of ``config`` for the options in which the configurations ``among`` differ."""
    keys = sorted({key for c in among for key in c})
    apart = [k for k in keys if any(c.get(k) != among[0].get(k) for c in among)]
    return [f"{k}={config.get(k)}" for k in apart]
