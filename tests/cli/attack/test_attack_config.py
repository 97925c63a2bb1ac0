"""``attack --config``: the options of a set in a file, as ``evaluate`` takes them; flags win."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Cli, one_sentence
from vlmdefend.evaluation.adversarial_sets.set_format import MANIFEST

Put = Callable[[str, str], Path]
FILE = "limit: 8\nbatch-size: 4\ndevice: cpu\neps: 8/255\nattack: fgsm\nseed: 3\n"


def cell_of(folder: Path) -> dict[str, Any]:
    cell: dict[str, Any] = json.loads((folder / MANIFEST).read_text())["cell"]
    return cell


def test_a_set_may_be_described_in_a_file_its_folder_and_its_pngs_too(cli: Cli, put: Put, tmp_path: Path) -> None:
    config = put("set.yaml", f"{FILE}defense: jpeg\nout: {tmp_path / 'set'}\npng: true\n")
    outcome = cli("attack", "--config", config)
    assert outcome.code == 0, outcome.err
    cell = cell_of(tmp_path / "set")
    assert (cell["attack"], cell["seed"], cell["n"], cell["attacker"]) == ("fgsm", 3, 8, "adaptive")
    assert len(list((tmp_path / "set" / "png").glob("*.png"))) == 8


def test_a_flag_wins_over_the_file(cli: Cli, put: Put, tmp_path: Path) -> None:
    config = put("set.yaml", f"{FILE}defense: jpeg\nout: {tmp_path / 'there'}\nattacker: adaptive\n")
    assert (
        cli("attack", "--config", config, "--out", tmp_path / "set", "--seed", "5", "--attacker", "whitebox").code == 0
    )
    assert not (tmp_path / "there").exists()
    cell = cell_of(tmp_path / "set")
    assert (cell["attack"], cell["seed"], cell["attacker"]) == ("fgsm", 5, "whitebox")


def test_a_file_and_flags_that_say_the_same_are_one_set(cli: Cli, put: Put, tmp_path: Path) -> None:
    flags = ("--limit", "8", "--batch-size", "4", "--device", "cpu", "--eps", "8/255", "-a", "fgsm", "--seed", "3")
    assert cli("attack", *flags, "--out", tmp_path / "set").code == 0
    again = cli("attack", "--config", put("set.yaml", FILE), "--out", tmp_path / "set")
    assert "found done" in again.out


def test_a_plugin_of_the_file_is_loaded(cli: Cli, put: Put, tmp_path: Path) -> None:
    from tests.cli.conftest import GRAY

    config = put("set.yaml", f"{FILE}defense: gray\nplugin: {put('gray.py', GRAY)}\n")
    assert cli("attack", "--config", config, "--out", tmp_path / "set").code == 0
    assert cell_of(tmp_path / "set")["defense"] == "gray"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("atack: pgd", ("unknown config key 'atack'", "did you mean 'attack'")),
        ("eps: [4/255, 8/255]", ("--eps has several values", "a set has one model, attack and eps")),
        ("png: perhaps", ("png: 'perhaps'", "write true or false")),
        ("adversarial: set", ("adversarial is an option of `vlmdefend evaluate`", "leave it out")),
        ("- attack", ("holds a list", "`option: value`")),
    ],
)
def test_what_a_file_gets_wrong_is_one_sentence(
    text: str, words: tuple[str, str], cli: Cli, put: Put, tmp_path: Path
) -> None:
    outcome = cli("attack", "--config", put("set.yaml", text), "--out", tmp_path / "set")
    assert outcome.code == 2
    sentence = one_sentence(outcome)
    assert all(part in sentence for part in words)
    assert not (tmp_path / "set").exists()


def test_without_a_folder_nothing_is_crafted(
    cli: Cli, put: Put, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = cli("attack", "--config", put("set.yaml", FILE))
    assert outcome.code == 2
    assert "--out: is missing; give the folder of the set" in one_sentence(outcome)
    assert [file.name for file in tmp_path.iterdir()] == ["set.yaml"]
