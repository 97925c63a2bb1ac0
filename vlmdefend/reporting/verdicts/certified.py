"""Certified accuracy: the share of images that are right and provably stay right within a radius, without an attack."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from vlmdefend.evaluation.statistics.intervals import mean_and_spread
from vlmdefend.evaluation.store.records import ImageRow
from vlmdefend.types import ABSTAINED

RADII = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)  # L2, pixels in [0, 1]
Curve = Mapping[float, float]  # radius -> share of the images


def certified_curve(rows: Sequence[ImageRow]) -> dict[float, float]:
    """Returns the share of images that are right with at least each certified radius; empty without certificates.

    Ends at the first radius that no image reaches. At radius 0 it is the clean accuracy; an image on which the defense
    abstains is wrong.
    """
    if not rows or any(row.certified_radius is None for row in rows):
        return {}
    radii = [row.certified_radius or 0.0 for row in rows if row.clean_correct]
    curve = {}
    for radius in RADII:
        curve[radius] = sum(reached >= radius for reached in radii) / len(rows)
        if curve[radius] == 0:
            break
    return curve


def abstained(rows: Sequence[ImageRow]) -> float:
    """Returns the share of clean images on which the defense abstains."""
    return sum(row.clean_prediction == ABSTAINED for row in rows) / len(rows) if rows else 0.0


def mean_curve(curves: Iterable[Curve]) -> dict[float, float]:
    """Returns the mean of the curves of several seeds; beyond its last radius a curve is zero."""
    curves = [curve for curve in curves if curve]
    radii = sorted({radius for curve in curves for radius in curve})
    return {radius: mean_and_spread([curve.get(radius, 0.0) for curve in curves])[0] for radius in radii}


def certified_text(curve: Curve, abstained: float) -> str:
    """Returns ``certified accuracy by L2 radius: 0 70.5 %, 0.1 61.0 %, ...; it abstains on 4.0 % of the images``."""
    points = ", ".join(f"{radius:g} {100 * share:.1f} %" for radius, share in curve.items())
    return f"certified accuracy by L2 radius: {points}; it abstains on {100 * abstained:.1f} % of the clean images"
