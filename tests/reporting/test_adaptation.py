"""The text of an adaptation: intervals, the bound's terms, doubts."""

from __future__ import annotations

from vlmdefend.reporting.adaptation import bound, doubts, result_text

SETTINGS = {"target": "dark", "eps": "4/255", "select": "last"}
NUMBERS = {"clean": [90, 100], "true_labels": [5, 100], "pseudo_labels": [8, 100], "worst": [5, 100]}
THEORY = {
    "source_accuracy": [98, 100],
    "target_accuracy": [90, 100],
    "domain_errors": [25, 100],
    "disagreement": [20, 100],
}


def test_every_number_has_its_interval_and_n() -> None:
    text = result_text(SETTINGS, {"before": NUMBERS, "theory": THEORY})
    assert text.startswith("dark, 100 held-out images; PGD-20, L_inf 4/255")
    assert "90.0 [82.6, 94.5]" in text
    assert "student" not in text
    assert "ORACLE" not in text
    assert "ORACLE" in result_text({**SETTINGS, "select": "oracle"}, {"before": NUMBERS})


def test_the_distance_is_two_less_four_errors_and_its_interval_is_turned_over() -> None:
    lines = bound(THEORY)
    # Wilson of 25 of 100: [0.1755, 0.3430]
    assert any("1.000 [0.628, 1.298]" in line for line in lines)
    assert any("R_S" in line and "0.020" in line for line in lines)
    assert any("A_T" in line and "0.200" in line and "at least" in line for line in lines)
    assert bound({}) == []


def test_errors_above_one_half_are_no_distance() -> None:
    assert any("0.000 [0.000," in line for line in bound({**THEORY, "domain_errors": [60, 100]}))


def test_an_attack_with_true_labels_that_does_less_harm_is_doubted() -> None:
    assert doubts({"student": NUMBERS}) == []
    strange = {**NUMBERS, "true_labels": [80, 100], "pseudo_labels": [20, 100]}
    assert "MASKED? student" in doubts({"teacher": None, "student": strange})[1]
