"""The text of an adaptation: intervals, the bound's terms, doubts."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmdefend.reporting.training.adaptation import CLASSIFIER, bound, doubts, result_text, verdict_command

SETTINGS = {"target": "dark", "eps": "4/255", "select": "last"}
NUMBERS = {"clean": [90, 100], "true_labels": [5, 100], "pseudo_labels": [8, 100], "worst": [5, 100]}
THEORY = {
    "source_accuracy": [98, 100],
    "target_accuracy": [90, 100],
    "domain_errors": [25, 100],
    "disagreement": [85, 100],
}


def test_every_number_has_its_interval_and_n(tmp_path: Path) -> None:
    text = result_text(SETTINGS, {"before": NUMBERS, "theory": THEORY}, tmp_path)
    assert text.startswith("dark: 100 held-out images, right % [95 %]\nattack: PGD-20, L_inf 4/255\n")
    assert "90.0 [82.6, 94.5]" in text
    assert "student" not in text
    assert "change" not in text
    assert "ORACLE" not in text
    assert "ORACLE" in result_text({**SETTINGS, "select": "oracle"}, {"before": NUMBERS}, tmp_path)


def test_teacher_and_student_stand_side_by_side_with_the_change_in_points(tmp_path: Path) -> None:
    after = {"clean": [88, 100], "true_labels": [60, 100], "pseudo_labels": [62, 100], "worst": [59, 100]}
    text = result_text(SETTINGS, {"before": NUMBERS, "after": after, "theory": THEORY}, tmp_path)
    rows = {line.split("  ")[0]: line.split() for line in text.splitlines()}
    assert rows["clean"][-1] == "-2.0"
    assert rows["PGD, true labels"][-1] == "+55.0"
    assert rows["worst of these"][-1] == "+54.0"
    assert max(len(line) for line in text.splitlines()) <= 80


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, "--dataset dark --attack autoattack --eps 4/255 --full"),
        ({"eval_limit": 200, "eps": "0.1"}, "--eps 0.1 --limit 200"),
        ({"eval_split": "all", "root": "sets"}, "--full --split all --root sets"),
        ({"target": "domain:Office Home/Art"}, "--dataset 'domain:Office Home/Art' --attack"),
    ],
)
def test_the_command_for_a_verdict_attacks_the_same_images_at_the_same_radius(
    tmp_path: Path, changed: dict[str, object], words: str
) -> None:
    assert words in verdict_command({**SETTINGS, **changed}, Path("out"))
    assert "verdict" not in result_text({**SETTINGS, **changed}, {"before": NUMBERS}, tmp_path)
    (tmp_path / CLASSIFIER).write_text("{}")
    assert f"--model local-dir:{tmp_path} " in result_text({**SETTINGS, **changed}, {"before": NUMBERS}, tmp_path)


def test_the_distance_is_two_less_four_errors_and_its_interval_is_turned_over() -> None:
    lines = bound(THEORY, NUMBERS)
    # Wilson of 25 of 100: [0.1755, 0.3430]
    assert any("1.000 [0.628, 1.298]" in line for line in lines)
    assert any("R_S" in line and "0.020" in line for line in lines)
    assert any("A_T" in line and "0.850" in line for line in lines)
    assert lines[-1] == "checked: 8 right under attack >= 90 the teacher has right - 85 apart from it"
    assert bound({}, NUMBERS) == []


def test_errors_above_one_half_are_no_distance() -> None:
    assert any("0.000 [0.000," in line for line in bound({**THEORY, "domain_errors": [60, 100]}, NUMBERS))


def test_an_attack_with_true_labels_that_does_less_harm_is_doubted() -> None:
    assert doubts({"student": NUMBERS}) == []
    strange = {**NUMBERS, "true_labels": [80, 100], "pseudo_labels": [20, 100]}
    assert "MASKED? student" in doubts({"teacher": None, "student": strange})[1]
