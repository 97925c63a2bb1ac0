"""A method from one file: usable at once, and a broken one breaks only itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import BROKEN, GRAY, SIGNS, Cli, error_line
from vlmdefend.evaluation.cell.evaluator import CellEvaluator

Put = Callable[[str, str], Path]


def records(tmp_path: Path) -> list[dict[str, object]]:
    return [json.loads(file.read_text()) for file in sorted((tmp_path / "runs").glob("cells/*/record.json"))]


def test_a_defense_and_an_attack_from_a_file_each_are_evaluated_by_name(
    evaluate: Cli, put: Put, tmp_path: Path
) -> None:
    plugins = ["--plugin", put("gray.py", GRAY), "--plugin", put("signs.py", SIGNS)]
    outcome = evaluate(*plugins, "-d", "none,gray:strength=0.5", "-a", "signs,pgd")
    assert outcome.code == 0, outcome.err
    cells = [record["cell"] for record in records(tmp_path)]
    assert {cell["attack"] for cell in cells} == {"signs", "pgd"}
    assert {cell["defense_config"].get("strength") for cell in cells} == {None, 0.5}
    # its gradient is exact, so the white-box attacker is the adaptive one: two attackers for gray, one without
    assert len(cells) == 2 * (1 + 2)
    assert "gray" in outcome.out


def test_an_option_of_a_plugin_is_checked_as_any_other(refused: Callable[..., str], put: Put) -> None:
    sentence = refused("--plugin", put("gray.py", GRAY), "-d", "gray:strenght=1")
    assert "did you mean 'strength'?" in sentence


def test_an_edited_plugin_is_another_method_and_is_computed_anew(evaluate: Cli, put: Put) -> None:
    options = ["--plugin", put("gray.py", GRAY), "-d", "gray", "-a", "none"]
    evaluate(*options)
    assert "found done" in evaluate(*options).out
    put("gray.py", GRAY.replace("images.mean(dim=1, keepdim=True)", "images[:, :1]"))
    assert "found done" not in evaluate(*options).out


@pytest.mark.parametrize("name", ["repeated:attack=signs", "repeated:n=1:attack=[eot:attack=[worst-of:attacks=signs]]"])
def test_an_edited_attack_inside_of_others_is_computed_anew(name: str, evaluate: Cli, put: Put) -> None:
    options = ["--plugin", put("signs.py", SIGNS), "-d", "none", "-a", name]
    assert evaluate(*options).code == 0
    assert "found done" in evaluate(*options).out
    put("signs.py", SIGNS + "\n# edited\n")
    assert "found done" not in evaluate(*options).out


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import nothing_of_this_name", "ModuleNotFoundError"),
        ("def f(:", "SyntaxError"),
        ("raise ValueError('first line\\nsecond line')", "ValueError: first line"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        (GRAY.replace('    recipe: ClassVar[Recipe] = Recipe("exact: autograd sees all of it")\n', ""), "no recipe"),
        (GRAY.replace('"gray"', '"jpeg"'), "defense 'jpeg' is defined twice"),
    ],
    ids=["missing import", "syntax", "raises", "exits", "no recipe", "name taken"],
)
def test_a_plugin_that_cannot_be_loaded_is_a_warning_and_the_run_goes_on(
    text: str, reason: str, evaluate: Cli, put: Put
) -> None:
    file = put("mine.py", text)
    outcome = evaluate("--plugin", file, "-a", "none", "-d", "none,jpeg")
    assert outcome.code == 0, outcome.err
    (warning,) = [line for line in outcome.err.splitlines() if line.startswith("warning:")]
    assert f"plugin {file} was not loaded" in warning
    assert reason in warning
    assert "Traceback" not in outcome.err


def test_two_plugins_of_one_name_are_refused_even_if_their_files_are_called_alike(
    evaluate: Cli, put: Put, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    outcome = evaluate("--plugin", put("gray.py", GRAY), "--plugin", put("other/gray.py", GRAY), "-a", "none")
    assert "defense 'gray' is defined twice" in outcome.err


def test_a_config_file_may_name_plugins(evaluate: Cli, put: Put) -> None:
    gray = put("gray.py", GRAY)
    config = put("run.yaml", f"plugin: {gray}\ndefense: gray\nattack: none\n")
    assert evaluate("--config", config).code == 0


# a cell that fails


def test_a_defect_in_a_defense_fails_its_cells_only_and_the_exit_code_says_so(
    evaluate: Cli, put: Put, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = put("broken.py", BROKEN)
    options = ["--plugin", broken, "-d", "none,broken,jpeg", "-a", "none"]
    outcome = evaluate(*options)
    assert outcome.code == 1
    assert outcome.errors == ["error: tiny-vit + broken on fashion: none seed 0: RuntimeError: the transform is broken"]
    assert "Traceback" not in outcome.err
    status = {record["cell"]["defense"]: (record["status"], record["error"]) for record in records(tmp_path)}
    assert status == {
        "none": ("done", None),
        "jpeg": ("done", None),
        "broken": ("error", "RuntimeError: the transform is broken"),
    }

    computed = []
    run = CellEvaluator.run
    monkeypatch.setattr(
        CellEvaluator, "run", lambda evaluator, *args: computed.append(evaluator.cell.defense) or run(evaluator, *args)
    )
    assert evaluate(*options).code == 1
    assert computed == ["broken"]


def test_a_cell_that_failed_is_done_once_its_cause_is_gone(evaluate: Cli, put: Put, tmp_path: Path) -> None:
    text = GRAY.replace("gray = images", "assert not open(FLAG).read(), 'flagged'\n        gray = images")
    flag = put("flag", "on")
    options = ["--plugin", put("gray.py", text.replace("FLAG", repr(str(flag)))), "-d", "gray", "-a", "none"]
    assert evaluate(*options).code == 1
    flag.write_text("")
    assert evaluate(*options).code == 0
    assert [record["status"] for record in records(tmp_path)] == ["done"]


def test_what_the_user_can_mend_in_a_cell_is_exit_code_2(evaluate: Cli, put: Put, tmp_path: Path) -> None:
    text = BROKEN.replace("RuntimeError", "UserError").replace(
        "from torch import Tensor", "from torch import Tensor\nfrom vlmdefend.errors import UserError"
    )
    outcome = evaluate("--plugin", put("broken.py", text), "-d", "broken,none", "-a", "none")
    assert outcome.code == 2
    assert outcome.errors == ["error: tiny-vit + broken on fashion: none seed 0: the transform is broken"]
    assert sorted(record["status"] for record in records(tmp_path)) == ["done", "error"]


def test_debug_shows_the_traceback_of_a_defect(put: Put, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlmdefend.cli.main import run

    options = ["--plugin", put("broken.py", BROKEN), "-d", "broken", "--limit", "4", "--out", tmp_path / "runs"]
    monkeypatch.setattr("sys.argv", ["vlmdefend", "evaluate", "--debug", *map(str, options)])
    with pytest.raises(RuntimeError, match="the transform"):
        run()


# memory


SMALL = GRAY.replace('"gray"', '"small"').replace(
    "gray = images", "if len(images) > 4:\n            raise torch.OutOfMemoryError('out')\n        gray = images"
)
SMALL = SMALL.replace("from torch import Tensor", "import torch\nfrom torch import Tensor")


def test_out_of_memory_halves_the_batch_and_changes_no_prediction(evaluate: Cli, put: Put, tmp_path: Path) -> None:
    options = ["--plugin", put("small.py", SMALL), "-d", "small", "--attacker", "whitebox"]
    outcome = evaluate(*options, "--batch-size", "16")
    assert outcome.code == 0, outcome.err
    assert "out of memory: the batch is halved to 8 images" in outcome.err
    assert "out of memory: the batch is halved to 4 images" in outcome.err
    (record,) = records(tmp_path)
    assert record["n"] == 16
    fitting = evaluate(*options, "--batch-size", "4")
    assert "out of memory" not in fitting.err
    small = [r for r in records(tmp_path) if r["cell"]["batch_size"] == 4]
    assert [(r["clean_correct"], r["robust"]) for r in small] == [(record["clean_correct"], record["robust"])]


def test_an_image_that_never_fits_is_one_sentence(evaluate: Cli, put: Put) -> None:
    outcome = evaluate("--plugin", put("small.py", SMALL.replace("> 4", "> 0")), "-d", "small", "-a", "none")
    assert outcome.code == 2
    assert "a single image does not fit into memory" in error_line(outcome.errors[0])
