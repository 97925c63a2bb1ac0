"""``vlmdefend attack`` and ``evaluate --adversarial`` as a shell sees them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.cli.conftest import SET, Cli, error_line, files_of, one_sentence
from vlmdefend.evaluation.adversarial_sets.set_format import INDEX, MANIFEST


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def refused(attack: Cli, tmp_path: Path) -> Callable[..., str]:
    """The one sentence with which ``attack`` refuses these options; nothing is written."""

    def call(*options: str) -> str:
        outcome = attack("refused", *options)
        assert outcome.code == 2, outcome
        assert outcome.out == ""
        assert not (tmp_path / "refused" / MANIFEST).exists()
        return one_sentence(outcome)

    return call


# the verdict


def test_the_verdict_is_short_and_says_what_the_files_hold(attack: Cli, tmp_path: Path) -> None:
    outcome = attack("set", "--eps", "8/255", "--png")
    assert outcome.code == 0, outcome.err
    assert all(len(line) <= 80 for line in outcome.out.splitlines())
    assert len(outcome.out.splitlines()) <= 16
    rows = [json.loads(line) for line in (tmp_path / "set" / INDEX).read_text().splitlines()]
    right = sum(row["clean_prediction"] == row["label"] for row in rows)
    said = " ".join(outcome.out.split())
    assert f"{right} of 16 right" in said
    assert f"fooled {sum(row['fooled'] for row in rows)} of {right};" in said
    assert f"largest distance {max(row['distance'] for row in rows):.6g}" in said
    assert "16 files" in said
    assert "0 outside the budget" in said
    assert Image.open(tmp_path / "set" / "contact_sheet.png").size[0] > 400


def test_the_set_is_a_run_folder_that_report_shows(attack: Cli, cli: Cli, tmp_path: Path) -> None:
    attack("set", "--eps", "8/255")
    outcome = cli("report", tmp_path / "set")
    assert outcome.code == 0
    assert "pgd steps=10" in outcome.out


def test_a_dry_run_writes_nothing(attack: Cli, tmp_path: Path) -> None:
    outcome = attack("set", "--eps", "8/255", "--dry-run")
    assert outcome.code == 0
    assert "Nothing was computed" in outcome.out
    assert not (tmp_path / "set").exists()


def test_help_shows_the_options(cli: Cli) -> None:
    outcome = cli("attack", "--help")
    assert outcome.code == 0
    assert all(option in outcome.out for option in ("--model", "--eps", "--png", "--attacker", "--out"))


def test_a_model_that_is_never_right_makes_a_set_without_a_picture(attack: Cli, tmp_path: Path) -> None:
    names = ("trousers", "t-shirt", "ankle boot", "bag", "sandal", "coat", "sneaker", "trouser", "shirt", "dress")
    (tmp_path / "names.txt").write_text("\n".join(names))  # every class has another one's name
    outcome = attack("set", "--eps", "4/255", "--limit", "1", "--classes", str(tmp_path / "names.txt"), "--png")
    assert outcome.code == 0, outcome.err
    assert "0 of 1 right" in outcome.out
    assert "the model was right on no image" in outcome.out
    assert not (tmp_path / "set" / "contact_sheet.png").exists()


# what is refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "--eps"),
        (("--eps", "2/255,4/255"), "--eps has several values"),
        (("--eps", "4/255", "--model", "tiny-vit,tiny-rn"), "--model has several values"),
        (("--eps", "4/255", "--attack", "pgd,fgsm"), "--attack has several values"),
        (("--eps", "4/255", "--seed", "0,1"), "--seed has several values"),
        (("--attack", "none"), "--attack none: leaves the images as they are"),
        (("--eps", "4"), "did you mean 4/255?"),
        (("--eps", "4/255", "--model", "tiny-vip"), "tiny-vit"),
        (("--eps", "4/255", "--attack", "pdg"), "pgd"),
        (("--eps", "4/255", "--norm", "l3"), "--norm"),
    ],
)
def test_what_is_not_one_set_is_refused(refused: Callable[..., str], options: tuple[str, ...], words: str) -> None:
    assert words in refused(*options)


def test_a_folder_holds_one_set(attack: Cli, tmp_path: Path) -> None:
    assert attack("set", "--eps", "8/255").code == 0
    before = files_of(tmp_path / "set")
    outcome = attack("set", "--eps", "4/255")
    assert outcome.code == 2
    assert "holds another set or run (it differs in eps); give a folder of its own" in one_sentence(outcome)
    assert files_of(tmp_path / "set") == before


def test_a_folder_of_evaluate_is_left_alone(attack: Cli, cli: Cli, tmp_path: Path) -> None:
    assert cli("evaluate", *SET, "--eps", "4/255", "-a", "fgsm", "--out", tmp_path / "set").code == 0
    assert "holds another set or run" in one_sentence(attack("set", "--eps", "4/255"))


def test_a_folder_without_a_set_is_refused_by_evaluate(cli: Cli, tmp_path: Path) -> None:
    for folder, words in ((tmp_path / "no", "no such folder"), (tmp_path, "holds no set of `vlmdefend attack`")):
        outcome = cli("evaluate", "--adversarial", folder, "--out", tmp_path / "runs")
        assert outcome.code == 2
        assert words in one_sentence(outcome)


@pytest.mark.parametrize("option", [("--eps", "8/255"), ("--attack", "pgd"), ("--limit", "4"), ("--steps", "3")])
def test_what_a_set_has_decided_is_refused_beside_it(
    option: tuple[str, str], attack: Cli, cli: Cli, tmp_path: Path
) -> None:
    attack("set", "--eps", "8/255")
    outcome = cli("evaluate", "--adversarial", tmp_path / "set", *option, "--out", tmp_path / "runs")
    assert outcome.code == 2
    assert option[0] in (line := one_sentence(outcome))
    assert "leave it out with --adversarial" in line


def test_a_damaged_file_is_one_sentence_and_exit_code_2(attack: Cli, cli: Cli, tmp_path: Path) -> None:
    attack("set", "--eps", "8/255")
    file = tmp_path / "set" / "images-00001.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-9])  # found before anything is computed
    command = ("evaluate", "--adversarial", tmp_path / "set", "--batch-size", "8", "--out", tmp_path / "runs")
    outcome = cli(*command)
    assert outcome.code == 2
    assert "images-00001.safetensors: is not what `vlmdefend attack` wrote" in one_sentence(outcome)
    file.write_bytes(content[:-1] + b"?")  # found when it is read
    outcome = cli(*command)
    assert outcome.code == 2
    (line,) = outcome.errors
    assert "images-00001.safetensors: is not what `vlmdefend attack` wrote" in error_line(line)


# the matrix


def test_the_matrix_has_a_row_per_set_and_a_column_per_target_in_80_columns(
    attack: Cli, cli: Cli, tmp_path: Path
) -> None:
    for model in ("tiny-vit", "tiny-rn"):
        assert attack(model, "--model", model, "--eps", "8/255").code == 0
    sets = f"{tmp_path / 'tiny-vit'},{tmp_path / 'tiny-rn'}"
    options = ("--model", "tiny-vit,tiny-rn", "--defense", "none,jpeg", "--batch-size", "8")
    outcome = cli("evaluate", "--adversarial", sets, *options, "--out", tmp_path / "runs")
    assert outcome.code == 0, outcome.err
    assert all(len(line) <= 80 for line in outcome.out.partition("\n8 cells in")[0].splitlines())
    lines = [line for line in outcome.out.splitlines() if line.startswith(("clean", "tiny-vit:pgd", "tiny-rn:pgd"))]
    assert sum(line.count("[") for line in lines) == 8  # robust accuracy with its interval
    again = cli("evaluate", "--adversarial", sets, *options, "--out", tmp_path / "runs")
    assert "8 of them found done" in again.out
    report = cli("report", tmp_path / "runs")
    assert "saved source=tiny-rn:pgd:steps=10" in " ".join(report.out.split())
    assert "whitebox and adaptive attackers" in " ".join(report.out.split())
