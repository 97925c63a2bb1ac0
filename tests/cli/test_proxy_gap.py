"""``vlmdefend proxy-gap``: the matrix, its files and its refusals."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from PIL import Image

from tests.cli.conftest import Cli, Outcome, one_sentence

QUICK = ("--limit", "20", "--device", "cpu", "--attack", "pgd:steps=2:last=true:alpha=eps")


@pytest.fixture
def gap(cli: Cli, tmp_path: Path) -> Cli:
    def call(*args: object) -> Outcome:
        return cli("proxy-gap", *QUICK, "--out", tmp_path / "gap", *args)

    return call


def test_every_model_is_attacked_and_scored_on_every_set(gap: Cli, tmp_path: Path) -> None:
    outcome = gap("--eps", "4/255,16/255")
    assert outcome.code == 0
    rows = list(csv.DictReader((tmp_path / "gap" / "gap.csv").open(encoding="utf-8")))
    assert [(row["eps"], row["target"], row["proxy"]) for row in rows] == [
        (eps, target, proxy)
        for eps in ("4/255", "16/255")
        for target in ("tiny-vit", "tiny-rn")
        for proxy in ("tiny-vit", "tiny-rn")
    ]
    for row in rows:
        assert int(row["n"]) == 20
        assert 0 <= float(row["low"]) <= float(row["adversarial"]) <= float(row["high"]) <= 1
        assert float(row["share_kept"]) == pytest.approx(float(row["adversarial"]) / float(row["clean"]))
    at_16 = {(row["target"], row["proxy"]): float(row["adversarial"]) for row in rows if row["eps"] == "16/255"}
    assert at_16["tiny-rn", "tiny-rn"] < 0.3 < at_16["tiny-rn", "tiny-vit"]


def test_the_table_shows_clean_accuracy_and_intervals_and_the_maps_are_pictures(gap: Cli, tmp_path: Path) -> None:
    outcome = gap("--eps", "8/255")
    lines = [line.split() for line in outcome.out.splitlines()]
    assert ["crafted", "on", "\\", "scored", "on", "tiny-vit", "tiny-rn"] in lines
    for name in ("clean", "tiny-vit", "tiny-rn"):
        (row,) = [line for line in lines if line and line[0] == name]
        assert len(row) == 1 + 2 * 3  # a share and two ends of its interval for each model
    with Image.open(tmp_path / "gap" / "heat-map-8-255.png") as picture:
        assert picture.width > 300
        assert len(picture.convert("RGB").getcolors(100000) or []) > 10


def test_only_the_target_is_attacked_if_the_option_says_so(gap: Cli, tmp_path: Path) -> None:
    assert gap("--target", "tiny-rn", "--eps", "8/255").code == 0
    rows = list(csv.DictReader((tmp_path / "gap" / "gap.csv").open(encoding="utf-8")))
    assert [(row["target"], row["proxy"]) for row in rows] == [("tiny-rn", "tiny-vit"), ("tiny-rn", "tiny-rn")]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--model", "tiny-vit"), "give at least two models; a gap is between two."),
        (("--model", "tiny-vit,tiny-rm"), "did you mean 'tiny-rn'"),
        (("--eps", "8"), "did you mean 8/255?"),
        (("--attack", "pgdd"), "did you mean 'pgd'"),
        (("--dataset", "fashon"), "did you mean 'fashion'"),
        (("--template", "a photo"), "has no {c}"),
    ],
)
def test_bad_input_is_one_sentence(gap: Cli, tmp_path: Path, options: tuple[str, ...], sentence: str) -> None:
    outcome = gap(*options)
    assert outcome.code == 2
    assert sentence in one_sentence(outcome)
    assert not (tmp_path / "gap").exists()
