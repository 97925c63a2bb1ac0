"""The evidence files fit their schema, belong to defenses, and hold what a verdict must hold."""

from __future__ import annotations

import pytest

from vlmdefend.defenses import DEFENSES
from vlmdefend.evaluation.statistics.intervals import wilson
from vlmdefend.published.evidence import defenses_with_evidence, evidence_on


def test_every_defense_has_a_file_and_every_file_a_defense() -> None:
    assert defenses_with_evidence() == DEFENSES.names()


@pytest.mark.parametrize("name", DEFENSES.names())
def test_a_measured_row_is_consistent(name: str) -> None:
    """The interval is Wilson's of worst and n; worst is at most every attacker's number; white-box is always there."""
    for row in evidence_on(name).measured:
        assert evidence_on(name).defense == name
        low, high = wilson(round(row.worst * row.n / 100), row.n)
        assert row.low == pytest.approx(100 * low, abs=0.06)
        assert row.high == pytest.approx(100 * high, abs=0.06)
        known = [value for value in (row.transfer, row.whitebox, row.adaptive) if value is not None]
        assert row.whitebox is not None
        assert row.worst <= min(known)
        assert max(known) <= row.clean


def test_a_defense_without_a_file_has_no_evidence() -> None:
    found = evidence_on("of-a-plugin")
    assert not found.papers
    assert not found.measured
    assert evidence_on("../evidence").measured == ()
