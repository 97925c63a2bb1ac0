"""``report`` of a folder that a training command wrote: its numbers again, as text, or one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.reporting.test_report_command import message, run
from vlmdefend.evaluation.statistics.diagnostics import Result

Write = Callable[[Path, Iterable[Result]], Path]
COUNTS = {"vanilla": [[90, 100], [0, 100]], "result": [[85, 100], [40, 100]]}
TRAIN = {"method": "tecoa", "model": "tiny-vit", "dataset": "fashion", "eps": "8/255"}
DISTILL = {"proxy": "tiny-vit", "target": "tiny-rn", "dataset": "fashion", "eps": "4/255"}
URDA = {"robustify": "dart-urda", "method": "mdd", "target": "dark", "eps": "0.1", "select": "last"}
NUMBERS = {"clean": [90, 100], "true_labels": [5, 100], "pseudo_labels": [8, 100], "worst": [5, 100]}


def folder_of(folder: Path, settings: dict[str, Any], summary: dict[str, Any] | None) -> Path:
    (folder / "training").mkdir(parents=True)
    (folder / "training" / "settings.json").write_text(json.dumps(settings))
    if summary is not None:
        (folder / "training" / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    summary = {"measured": {**COUNTS, "mix-0.5": [[88, 100], [20, 100]]}, "epochs": [], "finished": True}
    return folder_of(tmp_path / "trained", TRAIN, summary)


@pytest.fixture
def distilled(tmp_path: Path) -> Path:
    gap = {"clean": {"target": [9, 10], "proxy": [9, 10]}, "adversarial": {"target": [0, 10], "proxy": [8, 10]}}
    pivot = {"vanilla": COUNTS["vanilla"], "pivot": [[89, 100], [5, 100]], "result": COUNTS["result"]}
    return folder_of(tmp_path / "distilled", DISTILL, {"gap": gap, **pivot, "epochs": [], "finished": True})


@pytest.fixture
def adapted(tmp_path: Path) -> Path:
    return folder_of(tmp_path / "adapted", URDA, {"before": NUMBERS, "finished": True})


def test_a_trained_model_is_shown_with_vanilla_and_mixtures_and_the_command_for_a_verdict(trained: Path) -> None:
    lines = run(trained).stdout.splitlines()
    assert lines[0] == f"{trained}: tiny-vit, tecoa"
    assert "tiny-vit on 100 held-out images of fashion, PGD-10 at 8/255" in lines
    rows = [line.split() for line in lines if line.startswith(("vanilla", "result", "mix"))]
    # Wilson 95 % of 40 of 100: [0.309, 0.498]
    assert ["result", "85.0", "[76.7,", "90.7]", "40.0", "[30.9,", "49.8]"] in rows
    assert [row[0] for row in rows] == ["vanilla", "result", "mix-0.5"]
    assert f"  vlmdefend evaluate --model tiny-vit,local-dir:{trained} --attack autoattack --eps 8/255" in lines


def test_a_distilled_model_is_shown_with_vanilla_and_pivot(distilled: Path) -> None:
    shown = run(distilled).stdout
    assert f"{distilled}: tiny-rn, learned from tiny-vit" in shown
    assert [line.split()[0] for line in shown.splitlines() if line.count("[") == 2 and "%" not in line] == [
        "vanilla",
        "pivot",
        "result",
    ]


def test_a_run_without_held_out_images_says_that_nothing_was_measured(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "out", TRAIN, {"measured": {"result": []}, "epochs": [], "finished": True})
    assert "No image was held out, so nothing was measured." in run(folder).stdout


def test_several_runs_and_the_cells_of_evaluate_stand_one_after_the_other(
    trained: Path, adapted: Path, tmp_path: Path, grid: list[Result], write: Write
) -> None:
    cells = write(tmp_path / "runs", grid)
    shown = run(adapted, cells, trained).stdout
    places = [shown.index(words) for words in ("dark: 100 held-out", f"{trained}: tiny-vit", "jpeg")]
    assert places == sorted(places)
    out = tmp_path / "all.txt"
    done = run(adapted, cells, trained, "--out", out)
    assert out.read_text().split() == shown.split()  # a terminal may wrap lines elsewhere
    assert done.stderr == f"{out}: written, 2 training runs and 6 lines.\n"


@pytest.mark.parametrize("kind", ["trained", "distilled", "adapted"])
def test_a_run_is_written_to_a_file_as_it_is_shown(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder, out = request.getfixturevalue(kind), tmp_path / "run.txt"
    assert run(folder, "--out", out).exit_code == 0
    assert out.read_text() == run(folder).stdout.removesuffix("\n")


@pytest.mark.parametrize(
    ("kind", "command"), [("trained", "train"), ("distilled", "distill"), ("adapted", "urda-train")]
)
@pytest.mark.parametrize("options", [("--out", "run.csv"), ("--format", "markdown"), ("--out", "run.parquet")])
def test_another_format_is_refused_with_what_the_folder_is(
    kind: str, command: str, options: tuple[str, str], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = request.getfixturevalue(kind)
    monkeypatch.chdir(folder.parent)
    said = message(folder, *options)
    assert f"{folder}: is a run of `vlmdefend {command}`, which is shown as text only, not as " in said
    assert not (folder.parent / options[1]).exists()


@pytest.mark.parametrize("summary", [None, {"measured": COUNTS, "epochs": []}])
@pytest.mark.parametrize(
    ("settings", "command"),
    [(TRAIN, "train"), (DISTILL, "distill"), (URDA, "urda-train")],
    ids=lambda value: str(value),
)
def test_a_run_that_is_not_finished_names_its_command(
    settings: dict[str, Any], command: str, summary: dict[str, Any] | None, tmp_path: Path
) -> None:
    folder = folder_of(tmp_path / "out", settings, summary)
    assert message(folder) == f"{folder}: is not finished; run the same `vlmdefend {command}` command again."


@pytest.mark.parametrize("damage", ["{", "[]"])
@pytest.mark.parametrize("file", ["settings.json", "summary.json"])
def test_a_damaged_file_is_one_sentence(file: str, damage: str, trained: Path) -> None:
    (trained / "training" / file).write_text(damage)
    assert f"{file}: is not whole" in message(trained)


def test_a_folder_with_other_settings_is_looked_through_for_cells(tmp_path: Path) -> None:
    assert "holds no record" in message(folder_of(tmp_path / "out", {"speed": 3}, None))


@pytest.mark.parametrize(
    ("settings", "summary"),
    [
        ({"method": "tecoa"}, {"finished": True}),
        (TRAIN, {"measured": {"result": [1, 2]}, "finished": True}),
        (DISTILL, {"result": "x", "finished": True}),
        (URDA, {"before": [1], "finished": True}),
    ],
)
def test_files_that_hold_something_else_are_one_sentence(
    settings: dict[str, Any], summary: dict[str, Any], tmp_path: Path
) -> None:
    folder = folder_of(tmp_path / "run", settings, summary)
    assert message(folder).startswith(f"{folder / 'training'}: is not whole")
