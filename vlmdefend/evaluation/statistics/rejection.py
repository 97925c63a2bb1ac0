"""Accuracy against rejection rate of a detector, at every threshold. Imports no torch.

An image whose score is above the threshold is turned away. On clean images that is an error: accuracy counts what is
accepted and right. On adversarial ones it is a success: an image is robust if it is accepted and right when clean, and
when attacked turned away or right (Tramèr 2022, "robust error with rejection").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vlmdefend.evaluation.store.records import ImageRow

RATES = (0.0, 0.01, 0.05, 0.1, 0.2)


class OperatingPoint(NamedTuple):
    """Rejection rate, accuracy and robust accuracy at one threshold of a detector."""

    rate: float  # share of the clean images that may be turned away
    threshold: float  # scores above it are turned away
    rejected: float  # share of the clean images that is
    accuracy: float  # accepted and right
    robust: float  # that, and under attack turned away or right
    detected: float  # share of the images fooled without the detector that it turns away


def accuracy_against_rejection(rows: Sequence[ImageRow], rates: Sequence[float] = RATES) -> list[OperatingPoint]:
    """Returns one point per rate: the lowest threshold that rejects at most that share of the clean images.

    Rows without scores: no lines.
    """
    scored = [row for row in rows if row.clean_score is not None and row.adversarial_score is not None]
    if not scored:
        return []
    clean = sorted((row.clean_score or 0.0 for row in scored), reverse=True)
    lines = []
    for rate in rates:
        threshold = clean[min(int(rate * len(clean) + 1e-9), len(clean) - 1)]
        accepted = [row for row in scored if (row.clean_score or 0.0) <= threshold]
        right = [row for row in accepted if row.clean_correct]
        fooled = [row for row in scored if row.clean_correct and not row.robust]
        away = [row for row in fooled if (row.adversarial_score or 0.0) > threshold]
        robust = [row for row in right if row.robust or (row.adversarial_score or 0.0) > threshold]
        lines.append(
            OperatingPoint(
                rate,
                threshold,
                1 - len(accepted) / len(scored),
                len(right) / len(scored),
                len(robust) / len(scored),
                len(away) / len(fooled) if fooled else 0.0,
            )
        )
    return lines


def rejection_text(rows: Sequence[ImageRow], rates: Sequence[float] = RATES) -> str:
    """``turned away 0 / 5 / 10 % of the clean images: accuracy 88 / 85 / 81, robust 20 / 25 / 30 %``; empty if none."""
    lines = accuracy_against_rejection(rows, rates)
    if not lines:
        return ""
    columns = (
        [f"{100 * value:.{digits}f}" for value in values]
        for values, digits in (
            ([line.rate for line in lines], 0),
            ([line.accuracy for line in lines], 1),
            ([line.robust for line in lines], 1),
        )
    )
    rate, accuracy, robust = (" / ".join(column) for column in columns)
    return f"turning away {rate} % of the clean images leaves accuracy {accuracy} and robust {robust} %"
