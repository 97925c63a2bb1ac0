import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pandas
import pytest
import typer
from click.testing import Result as Outcome
from typer.testing import CliRunner

from vlmdefend.cli.report import report
from vlmdefend.errors import UserError
from vlmdefend.evaluation.statistics.diagnostics import Result

Write = Callable[[Path, Iterable[Result]], Path]
Make = Callable[..., Result]


def run(*args: object) -> Outcome:
    app = typer.Typer()
    app.command()(report)
    return CliRunner().invoke(app, [str(a) for a in args])


def message(*args: object) -> str:
    """The one sentence a failing command raises."""
    outcome = run(*args)
    assert isinstance(outcome.exception, UserError), outcome.output
    text = str(outcome.exception)
    assert "\n" not in text
    return text


@pytest.fixture
def folder(tmp_path: Path, grid: list[Result], write: Write) -> Path:
    return write(tmp_path / "runs", grid)


def test_report_prints_the_table(folder: Path) -> None:
    outcome = run(folder)
    assert outcome.exit_code == 0
    assert "40.0 [30.9, 49.8] MASKED?" in outcome.stdout


def test_report_takes_the_folder_runs_by_default(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert "MASKED?" in run().stdout


def test_report_reads_a_read_only_folder(folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    for path in [folder, *before]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        assert run(folder).exit_code == 0
        assert sorted(folder.rglob("*")) == before
    finally:
        for path in [folder, *before]:
            path.chmod(0o755 if path.is_dir() else 0o644)


@pytest.mark.parametrize(
    ("format", "start"), [("markdown", "### tiny-vit"), ("latex", "% needs"), ("csv", "protocol,protocol_hash")]
)
def test_report_writes_each_format_to_the_terminal_and_by_suffix(
    folder: Path, tmp_path: Path, format: str, start: str
) -> None:
    shown = run(folder, "-f", format)
    assert shown.stdout.startswith(start)
    out = tmp_path / {"markdown": "a.md", "latex": "a.tex", "csv": "a.csv"}[format]
    assert run(folder, "--out", out).exit_code == 0
    assert out.read_text() == shown.stdout
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_report_writes_parquet_to_a_file_only(folder: Path, tmp_path: Path) -> None:
    assert run(folder, "--out", tmp_path / "a.parquet").exit_code == 0
    assert len(pandas.read_parquet(tmp_path / "a.parquet")) == 6
    assert "add --out" in message(folder, "-f", "parquet")


def test_report_filters_by_name_and_helps_with_a_wrong_one(folder: Path) -> None:
    shown = run(folder, "--defense", "ttc", "--defense", "none").stdout
    assert "jpeg" not in shown
    assert "did you mean 'ttc'" in message(folder, "--defense", "tttc")
    assert "The records have: fashion." in message(folder, "--dataset", "imagenet")


def test_report_joins_folders_and_counts_no_cell_twice(
    folder: Path, tmp_path: Path, grid: list[Result], make: Make, write: Write
) -> None:
    repaired = make(range(40), range(89), range(100), defense="jpeg", attacker="adaptive", eps=4 / 255)
    second = write(tmp_path / "second", [grid[1], repaired])
    shown = run(folder, second).stdout
    assert "ERROR" not in shown
    assert "computed again" not in shown
    assert ["jpeg", "4/255", "89.0", "40.0", "35.0", "40.0", "35.0"] in [
        line.split()[:7] for line in shown.splitlines()
    ]


def test_report_says_when_the_same_cell_came_out_differently(
    folder: Path, tmp_path: Path, make: Make, write: Write
) -> None:
    other = make(range(20), range(90), range(100), defense="none", eps=4 / 255)
    shown = " ".join(run(folder, write(tmp_path / "second", [other])).stdout.split())
    assert "1 of its cells came out differently when computed again" in shown


def test_report_mentions_cells_that_are_half_done(folder: Path) -> None:
    half = folder / "cells" / "abc"
    half.mkdir()
    (half / "partial.jsonl").write_text("")
    assert "1 cell is half done" in run(folder).stderr


def test_report_errors_are_one_sentence(folder: Path, tmp_path: Path, make: Make, write: Write) -> None:
    assert "no such folder" in message(tmp_path / "missing")
    (tmp_path / "file").write_text("")
    assert "is a file" in message(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "looked for cells/*/record.json" in message(tmp_path / "empty")
    assert f"did you mean {folder}?" in message(tmp_path)
    (tmp_path / "half" / "cells" / "a").mkdir(parents=True)
    (tmp_path / "half" / "cells" / "a" / "partial.jsonl").write_text("")
    assert "half done" in message(tmp_path / "half")
    assert "cannot be written" in message(folder, "--out", tmp_path / "nowhere" / "a.csv")
    assert "is a folder" in message(folder, "-f", "csv", "--out", tmp_path)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        ("cut record", "is not a whole record"),
        ("newer schema", "upgrade vlmdefend"),
        ("cut rows", "holds 99 images where its record says 100"),
        ("broken row", "holds a line that is not a row"),
        ("no rows", "cannot be read"),
        ("edited rows", "where its record says"),
        ("doubled row", "holds an image twice"),
    ],
)
def test_report_refuses_a_damaged_cell(tmp_path: Path, make: Make, write: Write, damage: str, expected: str) -> None:
    folder = write(tmp_path / "runs", [make(range(50), ids=range(100))])
    record = next(folder.glob("cells/*/record.json"))
    rows = record.with_name("rows.jsonl")
    lines = rows.read_text().splitlines(keepends=True)
    if damage == "cut record":
        record.write_text(record.read_text()[:200])
    elif damage == "newer schema":
        record.write_text(json.dumps({**json.loads(record.read_text()), "schema_version": 99, "new": 1}))
    elif damage == "cut rows":
        rows.write_text("".join(lines[:-1]))
    elif damage == "broken row":
        rows.write_text("".join(lines)[:-20])
    elif damage == "no rows":
        rows.unlink()
    elif damage == "edited rows":
        rows.write_text("".join(lines).replace('"adversarial_prediction":1', '"adversarial_prediction":0'))
    else:
        rows.write_text("".join([*lines[:-1], lines[0]]))
    assert expected in message(folder)


def test_a_report_that_cannot_be_written_leaves_the_old_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a.csv"
    out.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vlmdefend.reporting.files.os.replace", full)
    assert "No space left" in message(folder, "--out", out)
    assert out.read_text() == "old"
    assert [p for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_importing_the_commands_and_printing_a_table_loads_nothing_heavy(folder: Path) -> None:
    code = (
        "import sys; import vlmdefend.cli.report, vlmdefend.cli.list_\n"
        "light = {'torch', 'pandas', 'matplotlib', 'rich.table', 'pydantic'}\n"
        "assert not light & set(sys.modules), light & set(sys.modules)\n"
        "from pathlib import Path\n"
        f"vlmdefend.cli.report.report([Path({str(folder)!r})])\n"
        "assert not {'torch', 'pandas', 'matplotlib'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
