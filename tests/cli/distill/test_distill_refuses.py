"""What ``vlmdefend distill`` refuses or warns of, and that it then trains nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Cli, one_sentence


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--proxy", "tiny-rn"), "--proxy and --target are both tiny-rn: a model has nothing to learn from itself"),
        (("--stage", "a", "--pivot", "x"), "--pivot: stage a makes the pivot"),
        (("--stage", "b"), "--stage b pulls towards a pivot: give --pivot OUT/pivot"),
        (("--stage", "b", "--pivot", "nowhere"), "--pivot nowhere: there is no such file or folder"),
        (("--stage", "c"), "--stage c: input should be 'both', 'a' or 'b'"),
        (("--profile", "papers"), "--profile papers: write paper, code or scaled"),
        (("--eps", "8"), "did you mean 8/255?"),
        (("--eps", "0"), "--eps and --alpha must be larger than 0"),
        (("--alpha", "eps*"), "--alpha eps*: write eps, eps/2, or a number such as 1/255"),
        (("--logit-scale", "-1"), "--logit-scale -1: write model, 1, or another positive number"),
        (("--pull", "1.5"), "--pull 1.5: must lie between 0 and 1"),
        (("--ema", "-0.1"), "--ema -0.1: must lie between 0 and 1"),
        (("--epochs-b", "0"), "--epochs-b 0: must be at least 1"),
        (("--direction", "both"), "--direction both: input should be 'proxy-first' or 'target-first'"),
        (("--split", "test"), "--split test: is what models are tested on"),
        (("--template", "a photo"), "--template 'a photo': has no {c}"),
        (("--track", "tensorbord"), "--track tensorbord: input should be"),
        (("--target", "tiny-rm"), "did you mean 'tiny-rn'"),
        (("--dataset", "fashon"), "did you mean 'fashion'"),
        (("--batch-norm", "train", "--micro-batch", "8"), "--batch-norm train needs the whole batch in one forward"),
        (("--precision", "float16"), "--precision float16: needs a GPU"),
    ],
)
def test_bad_input_is_one_sentence(distill: Cli, tmp_path: Path, options: tuple[str, ...], sentence: str) -> None:
    outcome = distill(*options)
    assert outcome.code == 2
    assert outcome.out == ""
    assert sentence in one_sentence(outcome)
    assert not (tmp_path / "out").exists()


def test_too_many_tensors_are_one_sentence(distill: Cli) -> None:
    outcome = distill("--trains", "last:999")
    assert outcome.code == 2
    assert "--trains last:999: write image, all, or last:K with K from 1 to" in outcome.errors[0]


def test_without_weights_and_network_it_says_what_to_do(cli: Cli) -> None:
    outcome = cli("distill", "--proxy", "ViT-B/32", "--target", "RN50")
    assert outcome.code == 2
    sentence = one_sentence(outcome)
    assert "the weights of RN50 are not in" in sentence
    for help_ in (
        "open_clip.create_model('RN50-quickgelu', pretrained='openai')",
        "--weights FILE",
        "tiny-vit or tiny-rn",
    ):
        assert help_ in sentence


def test_other_settings_do_not_go_on_with_a_run(distill: Cli, tmp_path: Path) -> None:
    assert distill().code == 0
    outcome = distill("--lr-b", "0.5")
    assert outcome.code == 2
    assert "holds a run with lr_b = 0.01, now it is 0.5; give another --out" in outcome.errors[0]


@pytest.mark.parametrize("file", ["notes.txt", "open_clip_config.json"])
def test_a_folder_of_something_else_is_left_alone(distill: Cli, tmp_path: Path, file: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / file).write_text("mine")
    outcome = distill()
    assert outcome.code == 2
    assert "give a new folder, so that nothing is lost" in outcome.errors[0]
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == [file]


def test_the_dry_run_prints_the_cost_and_trains_nothing(distill: Cli, tmp_path: Path) -> None:
    outcome = distill("--dry-run")
    assert outcome.code == 0
    rows = [line.split() for line in outcome.out.splitlines()]
    assert ["a", "1", "2", "192", "64"] in rows  # 64 images: 2 steps of the attack and 1 update; 1 forward of the proxy
    assert "Nothing was trained" in outcome.out
    assert "Memory about" in outcome.out
    assert not (tmp_path / "out").exists()


def test_a_warm_up_as_long_as_the_stage_is_warned_of(distill: Cli) -> None:
    outcome = distill("--profile", "code", "--batch-norm", "frozen", "--dry-run")
    assert "stage a has 2 steps, all of them warm-up: it never reaches its rate" in outcome.err


def test_a_proxy_that_generalises_less_well_is_warned_of(done: Path) -> None:
    summary = json.loads((done / "training" / "summary.json").read_text())["gap"]["clean"]
    err = (done.parent / "stderr").read_text()
    assert ("the proxy generalises less well than the target" in err) == (summary["proxy"][0] < summary["target"][0])


def test_a_tracker_that_is_not_installed_is_one_sentence(distill: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    outcome = distill("--track", "trackio")
    assert "--track trackio: the package is not installed; `pip install trackio`" in one_sentence(outcome)
