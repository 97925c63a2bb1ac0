"""Comparisons of outcomes image by image: robust under all attacks, sign test on discordant pairs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from vlmdefend.evaluation.store.records import ImageRow, Record

Outcome = tuple[Record, Sequence[ImageRow]]
SIGNIFICANT = 0.05  # p of the paired test
MATERIAL = 0.01  # one point of accuracy: a smaller difference is never flagged


def robust_under_all(results: Iterable[Outcome]) -> dict[str, bool]:
    """Returns image id -> robust under every one of these cells, over the ids that all of them have."""
    robust: dict[str, bool] | None = None
    for _, rows_of_cell in results:
        rows = {row.id: row.robust for row in rows_of_cell}
        before = rows if robust is None else robust
        robust = {i: so_far and rows[i] for i, so_far in before.items() if i in rows}
    return robust or {}


def sign_test(wins: int, losses: int) -> float:
    """Returns the p-value of the one-sided sign test on discordant pairs (McNemar's exact test).

    It is the probability of at least ``wins`` of ``wins + losses`` if both were equally likely.
    """
    n = wins + losses
    if n == 0:
        return 1.0
    total = math.lgamma(n + 1) - n * math.log(2)
    terms = [math.exp(total - math.lgamma(k + 1) - math.lgamma(n - k + 1)) for k in range(wins, n + 1)]
    return min(1.0, math.fsum(terms))


def clearly_lower(low: Mapping[str, bool], high: Mapping[str, bool]) -> bool:
    """Returns whether ``low`` has fewer of the shared images right than ``high``: by a point or more, with p < 0.05."""
    shared = low.keys() & high.keys()
    wins = sum(high[i] and not low[i] for i in shared)
    losses = sum(low[i] and not high[i] for i in shared)
    return wins - losses >= max(1.0, MATERIAL * len(shared)) and sign_test(wins, losses) < SIGNIFICANT


def share(right: Mapping[str, bool]) -> float:
    """Returns the share of these images that are right, 0..1."""
    return sum(right.values()) / len(right) if right else 0.0


def compared(low: Mapping[str, bool], high: Mapping[str, bool]) -> tuple[str, str]:
    """Returns both accuracies over the images they share, as text."""
    shared = low.keys() & high.keys()
    return percent(share({i: low[i] for i in shared})), percent(share({i: high[i] for i in shared}))


def percent(share: float) -> str:
    """Formats a share as ``45.2 %``."""
    return f"{100 * share:.1f} %"
