"""The cost per image of a defense and of the attacks on it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vlmdefend.evaluation.statistics.diagnostics import Result
from vlmdefend.evaluation.store.records import Cost


@dataclass(frozen=True)
class PerImage:
    """Forwards and backwards of the bare model per image; None where nothing was measured.

    ``deployed_*``: to predict one clean image with the deployed pipeline; the time is that of the fastest cell, since
    all do the same work and the time of the first cell includes the warm-up. ``attack_*``: to attack one clean-correct
    image with every attack of every attacker, one after the other.
    """

    deployed_forwards: float | None = None
    deployed_backwards: float | None = None
    deployed_ms: float | None = None
    attack_forwards: float | None = None
    attack_backwards: float | None = None
    attack_ms: float | None = None
    peak_memory_mb: float | None = None
    device: str = ""


def per_image(results: Sequence[Result]) -> PerImage:
    """Returns the cost of these cells; of one device only if they ran on several, since their times do not add up."""
    if not results:
        return PerImage()
    device = max({r.record.cell.device for r in results})  # cuda rather than cpu
    here = [r for r in results if r.record.cell.device == device]
    total = _sum(r.record.cost for r in here)
    by_attack: dict[tuple[str, str, str], list[Cost]] = {}
    for result in here:
        cell = result.record.cell
        key = (cell.attack, json.dumps(cell.attack_config, sort_keys=True), cell.attacker)
        if cell.attack != "none":
            by_attack.setdefault(key, []).append(result.record.cost)
    attacks = [_sum(costs) for costs in by_attack.values()]
    attacks = [cost for cost in attacks if cost.attack_images]
    return PerImage(
        deployed_forwards=_ratio(total.clean_forwards, total.clean_images),
        deployed_backwards=_ratio(total.clean_backwards, total.clean_images),
        deployed_ms=min(
            (1000 * c.clean_seconds / c.clean_images for c in (r.record.cost for r in here) if c.clean_images),
            default=None,
        ),
        attack_forwards=sum(c.attack_forwards / c.attack_images for c in attacks) if attacks else None,
        attack_backwards=sum(c.attack_backwards / c.attack_images for c in attacks) if attacks else None,
        attack_ms=sum(1000 * c.attack_seconds / c.attack_images for c in attacks) if attacks else None,
        peak_memory_mb=total.peak_memory_mb or None,
        device=device,
    )


def mean_cost(costs: Sequence[PerImage]) -> PerImage:
    """Returns the mean cost over the rows (radii or seeds) of one pipeline, on one device.

    The time of the pipeline is the fastest, the memory the largest.
    """
    device = max((c.device for c in costs), default="")
    here = [c for c in costs if c.device == device]

    def mean(name: str) -> float | None:
        values = [v for c in here if (v := getattr(c, name)) is not None]
        return sum(values) / len(values) if values else None

    return PerImage(
        deployed_forwards=mean("deployed_forwards"),
        deployed_backwards=mean("deployed_backwards"),
        deployed_ms=min((c.deployed_ms for c in here if c.deployed_ms is not None), default=None),
        attack_forwards=mean("attack_forwards"),
        attack_backwards=mean("attack_backwards"),
        attack_ms=mean("attack_ms"),
        peak_memory_mb=max((c.peak_memory_mb for c in here if c.peak_memory_mb), default=None),
        device=device,
    )


def _sum(costs: Iterable[Cost]) -> Cost:
    total = Cost()
    for cost in costs:
        total = total + cost
    return total


def _ratio(above: float, below: float) -> float | None:
    return above / below if below else None
