"""``vlmdefend urda-train`` from the command line: what it says and makes, and that ``evaluate`` takes it from there."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from tests.cli.conftest import Cli, Outcome, one_sentence
from vlmdefend.defenses.adaptation import ADAPTATIONS
from vlmdefend.training.adaptation.job import AdaptationJob

SMALL = ("--limit", "72", "--eval-limit", "20", "--batch-size", "18", "--batch-size-student", "18", "--device", "cpu")
SHORT = (
    *SMALL,
    "--iterations-teacher",
    "4",
    "--iterations-student",
    "4",
    "--epochs-teacher",
    "1",
    "--epochs-student",
    "1",
    "--steps",
    "2",
)
DIGITS = ("--source", "mnist", "--target", "uci-digits")


@pytest.fixture
def urda(cli: Cli, tmp_path: Path) -> Cli:
    """``urda("--method", "dann")`` on few digits, into ``tmp_path / "out"``."""

    def call(*args: object) -> Outcome:
        pair = () if "--source" in args or "--target" in args else DIGITS
        out = () if "--out" in args else ("--out", tmp_path / "out")
        return cli("urda-train", *pair, *SHORT, *out, *args)

    return call


def test_both_steps_run_and_the_three_numbers_of_both_models_are_printed(urda: Cli, tmp_path: Path) -> None:
    outcome = urda()
    assert outcome.code == 0, outcome.err
    assert "DartUrda(weight_reduction='mean'" in outcome.err
    assert "no target label is read" in outcome.err
    assert "step 1" in outcome.err
    assert "PGD, true labels" in outcome.out
    lines = outcome.out.splitlines()
    assert next(line.split() for line in lines if "teacher" in line) == ["teacher", "student", "change"]
    assert max(len(line) for line in lines if str(tmp_path) not in line) <= 80
    for term in ("R_S", "proxy A-distance", "lambda*", "A_T", "checked"):
        assert term in outcome.out
    for folder in (tmp_path / "out", tmp_path / "out" / "teacher"):
        assert (folder / "vlmdefend_classifier.json").is_file()
    assert (tmp_path / "out" / "training" / "student" / "log.jsonl").is_file()
    again = urda()
    assert "found done" in again.out
    assert again.out.replace("found done", "written") == outcome.out


def test_what_it_made_is_evaluated_like_any_other_model(urda: Cli, cli: Cli, tmp_path: Path) -> None:
    assert urda().code == 0
    common = ("--limit", "20", "--eps", "0.05", "--steps", "2", "--out", tmp_path / "runs", "--device", "cpu")
    evaluated = cli("evaluate", "--model", f"local-dir:{tmp_path / 'out'}", "--dataset", "uci-digits", *common)
    assert evaluated.code == 0, evaluated.err
    assert "uci-digits" in evaluated.out
    refused = cli("evaluate", "--model", f"local-dir:{tmp_path / 'out'}", "--dataset", "fashion", *common)
    assert refused.code == 2
    assert "was trained for 10 classes (zero, one, two" in refused.err


def test_the_command_that_is_printed_for_a_verdict_gives_one_on_the_same_images(
    urda: Cli, cli: Cli, tmp_path: Path
) -> None:
    outcome = urda("--eps", "0.02")
    command = next(line for line in outcome.out.splitlines() if "--attack autoattack" in line)
    assert f"--model local-dir:{tmp_path / 'out'} " in command
    assert command.endswith("--eps 0.02 --limit 20")
    words = shlex.split(command)[1:]
    words[words.index("autoattack")] = "autoattack:steps=5:queries=50"
    judged = cli(*words, "--out", tmp_path / "runs", "--device", "cpu")
    assert judged.code == 0, judged.err
    (record,) = [json.loads(file.read_text()) for file in (tmp_path / "runs").rglob("record.json")]
    numbers = json.loads((tmp_path / "out" / "training" / "summary.json").read_text())["after"]
    assert record["clean_correct"] == numbers["clean"][0]
    assert record["robust"] <= numbers["true_labels"][0]


def test_the_other_pair_runs_too(urda: Cli) -> None:
    outcome = urda("--source", "emoji:google", "--target", "emoji:sketch", "--method", "mcc")
    assert outcome.code == 0, outcome.err
    assert "emoji:sketch: 20 held-out images" in outcome.out


def test_step_two_can_be_left_out(urda: Cli) -> None:
    outcome = urda("--robustify", "none")
    assert outcome.code == 0, outcome.err
    assert "left out" in outcome.err
    assert "student" not in outcome.out


def test_the_oracle_is_chosen_by_its_name_and_printed(urda: Cli) -> None:
    assert "--oracle" in one_sentence(urda("--select", "oracle"))
    assert "contradict" in one_sentence(urda("--oracle", "--select", "entropy"))
    outcome = urda("--oracle", "--held-out", "18", "--robustify", "none")
    assert outcome.code == 0, outcome.err
    assert "warning: --oracle" in outcome.err
    assert "ORACLE" in outcome.out


def test_a_backbone_that_saw_the_target_is_warned_of(urda: Cli) -> None:
    outcome = urda("--backbone", "tiny-vit", "--dry-run")
    assert outcome.code == 0, outcome.err
    assert "tiny-vit was trained on the training images of all embedded sets" in outcome.err
    assert "tiny-vit" not in urda("--dry-run").err


def test_a_teacher_that_cannot_do_its_part_is_warned_of(urda: Cli) -> None:
    assert "rfa takes its robustness from a robust teacher" in urda("--robustify", "rfa", "--dry-run").err
    assert "rfa" not in urda("--dry-run").err


def test_a_dry_run_tells_the_cost_and_writes_nothing(urda: Cli, tmp_path: Path) -> None:
    outcome = urda("--dry-run", "--method", "shot")
    assert outcome.code == 0, outcome.err
    rows = {line.split()[0]: line.split()[1:] for line in outcome.out.splitlines() if line and line[0] == "t"}
    assert {"teacher-source-only", "teacher"} <= set(rows)
    student = next(line.split() for line in outcome.out.splitlines() if line.startswith("student"))
    assert student[1:] == ["1", "4", str(72 * 4), "72"]  # 2 steps of the attack and 2 student forwards an image
    assert not (tmp_path / "out").exists()


def test_the_released_profile_is_the_code_of_the_authors(cli: Cli, tmp_path: Path) -> None:
    outcome = cli("urda-train", *DIGITS, "--profile", "released", "--out", tmp_path / "out", "--dry-run")
    assert outcome.code == 0, outcome.err
    for words in (
        "weight_reduction='released', trade_off=0.1, temperature=2.0, eps=0.1, alpha=0.05, steps=10, space='pixel'",
        "of the student: imagenet",
        "20 epochs, rate 0.005, batch 18",
        "momentum 0.9, weight decay 0.001",
    ):
        assert words in outcome.err
    student = next(line.split() for line in outcome.out.splitlines() if line.startswith("student"))
    assert student[2] == "10000"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--source", "mnist", "--target", "mnist"), "there is no shift to adapt to"),
        (("--source", "mnist", "--target", "fashion"), "is in one of them only"),
        (("--source", "mnist", "--target", "mnits"), "did you mean"),
        (("--method", "dan-urda"), "unknown adaptation"),
        (("--robustify", "dart-urda:lambda=1"), "lambda"),
        (("--ablate", "entropy"), "--ablate"),
        (("--backbone", "timm:resnet51"), "unknown timm model"),
        (("--eps", "8"), "8/255"),
        (("--init", "random"), "--init random"),
        (("--clip", "0"), "--clip 0"),
        (("--teacher", "timm:local-dir:nowhere"), "config.json cannot be read"),
        (("--source", "domain:nowhere/Art", "--target", "mnist"), "there is no such folder"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(
    urda: Cli, tmp_path: Path, args: tuple[str, ...], words: str
) -> None:
    outcome = urda(*args)
    assert outcome.code == 2
    assert words in outcome.errors[0]
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "out" / "vlmdefend_classifier.json").exists()


def test_ctrl_c_keeps_what_is_done_and_says_how_to_go_on(
    urda: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = AdaptationJob._student

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(AdaptationJob, "_student", interrupted)
        outcome = urda()
    assert outcome.code == 130
    assert "the same command goes on from there" in outcome.err
    assert AdaptationJob._student is student
    whole = urda("--out", tmp_path / "whole")
    resumed = urda()
    assert resumed.code == 0, resumed.err
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "whole")]
    assert weights[0] == weights[1]
    assert json.loads((tmp_path / "out" / "training" / "summary.json").read_text())["finished"]
    assert whole.code == 0


def test_report_shows_the_same_numbers_again(urda: Cli, cli: Cli, tmp_path: Path) -> None:
    outcome = urda()
    shown = cli("report", tmp_path / "out")
    assert shown.code == 0, shown.err
    body = [line for line in outcome.out.splitlines() if line and not line.endswith("written.")]
    assert [line for line in shown.out.splitlines() if line][1:] == body
    (tmp_path / "out" / "training" / "summary.json").unlink()
    assert "is not finished" in one_sentence(cli("report", tmp_path / "out"))


def test_every_method_is_listed_by_its_role(cli: Cli) -> None:
    outcome = cli("list", "adaptations")
    assert outcome.code == 0, outcome.err
    for name in ("dart-urda", "dart-dad", "mdd", "zero-shot"):
        assert name in outcome.out
    assert "robustification" in outcome.out


PLUGIN = '''"""Half: half the cross-entropy of the source."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F

from vlmdefend.defenses.adaptation import ADAPTATIONS
from vlmdefend.defenses.adaptation.base import Adaptation, domains_of, student_of, whole
from vlmdefend.defenses.training_time.base import Terms


@ADAPTATIONS.register
@dataclass(frozen=True, kw_only=True)
class Half(Adaptation):
    """Half the cross-entropy."""

    name: ClassVar[str] = "half"
    summary: ClassVar[str] = "half the cross-entropy of the source"
    citation: ClassVar[str] = "–"
    role: ClassVar[str] = "adaptation"
    domains: ClassVar[str] = "source"

    def losses(self, student, teacher, batch, rng):
        """Half."""
        source = domains_of(batch).source
        logits = student_of(student)(source.images).logits
        return Terms(whole(batch, half=F.cross_entropy(logits, source.labels) / 2), {})
'''


def test_a_method_of_the_user_is_one_file(urda: Cli, tmp_path: Path) -> None:
    (tmp_path / "half.py").write_text(PLUGIN)
    try:
        outcome = urda("--plugin", tmp_path / "half.py", "--method", "half", "--robustify", "none")
    finally:
        ADAPTATIONS._classes.pop("half", None)
    assert outcome.code == 0, outcome.err
    assert "Half()" in outcome.err
