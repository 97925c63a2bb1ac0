"""``--config``: the same options in a file; flags win; what cannot be understood is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Cli

Put = Callable[[str, str], Path]


def cells(folder: Path) -> list[dict[str, object]]:
    return [json.loads(file.read_text())["cell"] for file in sorted(folder.glob("cells/*/record.json"))]


def test_options_may_come_from_a_file(evaluate: Cli, put: Put, tmp_path: Path) -> None:
    text = f"attack: [none, fgsm]\neps: 2/255\nlimit: 8\nbatch-size: 4\nseed: [1, 2]\nout: {tmp_path / 'there'}\n"
    outcome = evaluate("--config", put("run.yaml", text), "--eps", "2/255")
    assert outcome.code == 0, outcome.err
    # --out was given on the command line by the fixture and wins; the rest is the file's
    found = cells(tmp_path / "runs")
    assert {(cell["attack"], cell["seed"]) for cell in found} == {(a, s) for a in ("none", "fgsm") for s in (1, 2)}


def test_the_output_folder_may_come_from_a_file(cli: Cli, put: Put, tmp_path: Path) -> None:
    text = f"attack: none\nlimit: 8\ndevice: cpu\nout: {tmp_path / 'there'}\n"
    assert cli("evaluate", "--config", put("run.yaml", text)).code == 0
    assert len(cells(tmp_path / "there")) == 1


def test_a_flag_wins_over_the_file(evaluate: Cli, put: Put, tmp_path: Path) -> None:
    config = put("run.yaml", "attack: pgd\nseed: 7\nlimit: 100\n")
    assert evaluate("--config", config, "-a", "none", "--limit", "8").code == 0
    (cell,) = cells(tmp_path / "runs")
    assert (cell["attack"], cell["seed"], cell["n"]) == ("none", 7, 8)


@pytest.mark.parametrize(
    ("text", "given", "advice"),
    [
        ("atack: pgd", "unknown config key 'atack'", "did you mean 'attack'"),
        ("attack: [pgd", "is not valid YAML (line 1)", "`option: value`"),
        ("- attack", "holds a list", "`option: value`"),
        ("", "holds nothing", "`option: value`"),
        ("limit: 0", "--limit 0", "at least 1"),
        ("seed: many", "--seed 'many'", "valid integer"),
        ("skip_bad: perhaps", "--skip-bad 'perhaps'", "valid boolean"),
        ("defense:", "--defense None", "give at least one"),
        ("templates: a photo", "--template 'a photo'", "write it where the class name goes"),
        ("eps: 8", "eps '8'", "did you mean 8/255?"),
    ],
)
def test_what_a_file_gets_wrong_is_one_sentence(
    text: str, given: str, advice: str, cli: Cli, put: Put, tmp_path: Path
) -> None:
    from tests.cli.conftest import one_sentence

    outcome = cli("evaluate", "--config", put("run.yaml", text), "--out", tmp_path / "runs")
    assert outcome.code == 2
    sentence = one_sentence(outcome)
    assert given in sentence
    assert advice in sentence


def test_a_file_that_is_not_text_is_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00\x01")
    assert "is not valid YAML" in refused("--config", tmp_path / "run.yaml")
