"""Accuracy against rejection rate of a detector, at every threshold. Imports no torch.

An image whose score is above the threshold is rejected. On clean images that is an error: accuracy counts images that
are accepted and right. On adversarial images it is a success: an image is robust if its clean version is accepted and
right, and its adversarial version is rejected or right (Tramèr 2022, "robust error with rejection").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vlmdefend.evaluation.store.records import ImageRow

RATES = (0.0, 0.01, 0.05, 0.1, 0.2)


class OperatingPoint(NamedTuple):
    """Rejection rate, accuracy and robust accuracy at one threshold of a detector."""

    rate: float  # share of the clean images that may be rejected
    threshold: float  # images with a higher score are rejected
    rejected: float  # share of the clean images that is rejected
    accuracy: float  # share of the clean images that is accepted and right
    robust: float  # the same, and under attack rejected or right
    detected: float  # share of the fooled images that the detector rejects


def accuracy_against_rejection(rows: Sequence[ImageRow], rates: Sequence[float] = RATES) -> list[OperatingPoint]:
    """Returns one point per rate: the lowest threshold that rejects at most that share of the clean images.

    Without scores the list is empty.
    """
    scored = [row for row in rows if row.clean_score is not None and row.adversarial_score is not None]
    if not scored:
        return []
    clean = sorted((row.clean_score or 0.0 for row in scored), reverse=True)
    points = []
    for rate in rates:
        threshold = clean[min(int(rate * len(clean) + 1e-9), len(clean) - 1)]
        accepted = [row for row in scored if (row.clean_score or 0.0) <= threshold]
        right = [row for row in accepted if row.clean_correct]
        fooled = [row for row in scored if row.clean_correct and not row.robust]
        detected = [row for row in fooled if (row.adversarial_score or 0.0) > threshold]
        robust = [row for row in right if row.robust or (row.adversarial_score or 0.0) > threshold]
        points.append(
            OperatingPoint(
                rate,
                threshold,
                1 - len(accepted) / len(scored),
                len(right) / len(scored),
                len(robust) / len(scored),
                len(detected) / len(fooled) if fooled else 0.0,
            )
        )
    return points


def rejection_text(rows: Sequence[ImageRow], rates: Sequence[float] = RATES) -> str:
    """Returns one sentence with accuracy and robust accuracy at each rejection rate; empty without scores."""
    points = accuracy_against_rejection(rows, rates)
    if not points:
        return ""
    columns = (
        [f"{100 * value:.{digits}f}" for value in values]
        for values, digits in (
            ([point.rate for point in points], 0),
            ([point.accuracy for point in points], 1),
            ([point.robust for point in points], 1),
        )
    )
    rate, accuracy, robust = (" / ".join(column) for column in columns)
    return f"rejecting {rate} % of the clean images leaves accuracy {accuracy} and robust {robust} %"
