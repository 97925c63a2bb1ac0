"""Nothing that was computed is lost, nothing is computed twice, and an interruption leaves no trace in the result."""

from __future__ import annotations

import fcntl
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Cli, error_line, rows_of
from vlmdefend.evaluation.cell.evaluator import CellEvaluator

LONG = ("--limit", "200", "--batch-size", "16", "-a", "pgd:steps=20", "--eps", "4/255,8/255", "--threads", "1")
LONG = (*LONG, "--device", "cpu")
TWO = ("-a", "none,pgd")
MEASURED = {"clean_seconds", "attack_seconds", "peak_memory_mb"}


def start(out: Path, *options: str) -> subprocess.Popen[str]:
    """The command as a process of its own."""
    command = [sys.executable, "-c", "from vlmdefend.cli.main import run; run()", "evaluate", *options]
    return subprocess.Popen(
        [*command, "--out", str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it else
    )


def shards(out: Path) -> int:
    """Whole shards of cells that are not done."""
    files = [file for file in out.glob("cells/*/partial.jsonl") if not (file.parent / "record.json").exists()]
    return sum(file.read_bytes().count(b"\n") for file in files)


def progress(out: Path) -> int:
    """Grows with each shard and each finished cell."""
    return shards(out) + 1000 * len(list(out.glob("cells/*/record.json")))


def wait_for_progress(out: Path, process: subprocess.Popen[str], before: int) -> None:
    deadline = time.monotonic() + 240
    while process.poll() is None and progress(out) <= before:
        assert time.monotonic() < deadline, "no shard was finished"
        time.sleep(0.01)


def records_of(out: Path) -> dict[str, dict[str, Any]]:
    """Key -> the record without what a clock or the machine says."""
    records = {}
    for file in sorted(out.glob("cells/*/record.json")):
        record = json.loads(file.read_text())
        record["cost"] = {k: v for k, v in record["cost"].items() if k not in MEASURED}
        records[file.parent.name] = {k: v for k, v in record.items() if k not in ("started", "finished")}
    return records


def test_a_run_that_is_killed_again_and_again_ends_with_the_bytes_of_one_that_was_not(cli: Cli, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert cli("evaluate", *LONG, "--out", whole).code == 0
    rng = random.Random(20)
    hits = 0
    for _ in range(2):
        process = start(killed, *LONG)
        wait_for_progress(killed, process, progress(killed))
        time.sleep(rng.uniform(0.0, 0.3))
        process.kill()
        process.communicate()
        hits += process.returncode == -signal.SIGKILL and shards(killed) > 0
    assert hits, "no kill hit a half-done cell, so this test proved nothing"

    assert cli("evaluate", *LONG, "--out", killed).code == 0
    assert len(rows_of(whole)) == 2
    assert rows_of(killed) == rows_of(whole)
    assert records_of(killed) == records_of(whole)
    assert not list(killed.glob("cells/*/partial.jsonl"))


def test_ctrl_c_keeps_finished_shards_and_the_same_command_goes_on(cli: Cli, tmp_path: Path) -> None:
    process = start(tmp_path / "runs", *LONG)
    wait_for_progress(tmp_path / "runs", process, 0)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "interrupted; what is done is kept in" in err
    assert "the same command goes on from there" in err
    assert "Traceback" not in err
    kept = shards(tmp_path / "runs")
    assert kept

    computed = []
    with pytest.MonkeyPatch.context() as patch:
        shard = CellEvaluator._shard
        patch.setattr(
            CellEvaluator,
            "_shard",
            lambda evaluator, number, index: computed.append(1) or shard(evaluator, number, index),
        )
        assert cli("evaluate", *LONG, "--out", tmp_path / "runs").code == 0
    cells = [record["cell"] for record in records_of(tmp_path / "runs").values()]
    assert len(cells) == 2
    assert len(computed) <= sum(math.ceil(cell["n"] / cell["shard_size"]) for cell in cells) - kept


def test_the_same_command_again_computes_nothing_and_says_the_same(
    evaluate: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, rows = evaluate(*TWO), rows_of(tmp_path / "runs")
    monkeypatch.setattr(CellEvaluator, "run", lambda *args: pytest.fail("computed again"))
    second = evaluate(*TWO)
    assert (first.code, second.code) == (0, 0)
    assert rows_of(tmp_path / "runs") == rows
    assert "2 of them found done" in second.out
    assert second.out.partition("\n2 cells")[0] == first.out.partition("\n2 cells")[0]


# a cell that another process writes


def test_a_cell_that_another_process_writes_is_left_alone_and_the_others_are_computed(
    evaluate: Cli, tmp_path: Path
) -> None:
    evaluate(*TWO)
    folders = sorted((tmp_path / "runs" / "cells").iterdir())
    for folder in folders:
        (folder / "record.json").unlink()
    with (folders[0] / "lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        outcome = evaluate(*TWO)
    assert outcome.code == 2
    (line,) = outcome.errors
    assert "another process is writing this cell" in error_line(line)
    assert "wait for it" in line
    assert not (folders[0] / "record.json").exists()
    assert (folders[1] / "record.json").exists()
    assert evaluate(*TWO).code == 0


def test_a_disk_that_cannot_lock_is_not_taken_for_another_process(
    evaluate: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    outcome = evaluate("-a", "none")
    assert outcome.code == 2
    assert "cannot lock files (No locks available); give an --out on another disk." in error_line(outcome.errors[0])


# damaged files


@pytest.fixture
def done(evaluate: Cli, tmp_path: Path) -> Path:
    """The folder of the one cell that was computed."""
    assert evaluate("-a", "none").code == 0
    (folder,) = (tmp_path / "runs" / "cells").iterdir()
    return folder


def damaged(evaluate: Cli) -> str:
    outcome = evaluate("-a", "none")
    assert outcome.code == 2
    (line,) = outcome.errors
    return error_line(line)


def test_a_half_done_cell_of_another_version_is_named_and_left_as_it_is(done: Path, evaluate: Cli) -> None:
    assert "half done" not in evaluate("-a", "none").err
    other = done.parent / "0123456789abcdef"  # another version of the code has another key for the same cell
    other.mkdir()
    (other / "partial.jsonl").write_bytes((done / "rows.jsonl").read_bytes())
    outcome = evaluate("-a", "none")
    assert outcome.code == 0
    assert f"{other}: half done and not used here" in outcome.err
    assert "delete the folder if it is not needed" in outcome.err
    assert (other / "partial.jsonl").read_bytes() == (done / "rows.jsonl").read_bytes()


def test_a_record_of_a_newer_schema_is_not_touched(done: Path, evaluate: Cli) -> None:
    file = done / "record.json"
    text = file.read_text().replace('"schema_version": 1', '"schema_version": 99')
    file.write_text(text)
    assert "has record schema 99" in (line := damaged(evaluate))
    assert "upgrade vlmdefend" in line
    assert file.read_text() == text


def test_a_record_cut_in_half_is_named_with_the_way_out(done: Path, evaluate: Cli) -> None:
    file = done / "record.json"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    line = damaged(evaluate)
    assert str(file) in line
    assert f"delete the folder {done} and run the same command again" in line
    shutil.rmtree(done)
    assert evaluate("-a", "none").code == 0


@pytest.mark.parametrize("cut", ["within a line", "between lines", "missing"])
def test_rows_that_are_cut_are_noticed_wherever_the_cut_is(cut: str, done: Path, evaluate: Cli) -> None:
    file = done / "rows.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    content = b"".join(lines[:5]) + (lines[5][:20] if cut == "within a line" else b"")
    file.unlink() if cut == "missing" else file.write_bytes(content)
    assert str(file) in damaged(evaluate)


def test_damage_to_one_cell_does_not_stop_the_others(done: Path, evaluate: Cli) -> None:
    (done / "record.json").write_text("{")
    outcome = evaluate(*TWO)
    assert outcome.code == 2
    assert len(outcome.errors) == 1
    assert "pgd steps=10" in outcome.out


# a full disk


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """What a full disk does, for every file of this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_up_keeps_whole_shards_and_the_same_command_goes_on(evaluate: Cli, tmp_path: Path) -> None:
    options = ("--limit", "40", "--batch-size", "4", "-a", "none")
    assert evaluate(*options).code == 0
    (folder,) = (tmp_path / "runs" / "cells").iterdir()
    expected = (folder / "rows.jsonl").read_bytes()
    shutil.rmtree(folder)

    with files_no_larger_than(len(expected) // 2):
        outcome = evaluate(*options)
    assert outcome.code == 2
    assert "no space left to write; finished cells are kept" in error_line(outcome.errors[0])
    assert "run the same command again" in outcome.errors[0]
    partial = (folder / "partial.jsonl").read_bytes()
    assert partial.endswith(b"\n"), "no half line is left"
    assert 1 <= partial.count(b"\n") < 10
    assert not (folder / "record.json").exists()

    assert evaluate(*options).code == 0
    assert (folder / "rows.jsonl").read_bytes() == expected


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if mount is None or subprocess.run([mount, "-t", "tmpfs", "-o", "size=64k", "none", disk], check=False).returncode:
        pytest.skip("only root may mount a disk")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_full_disk_keeps_finished_cells_and_the_same_command_goes_on_when_there_is_space(
    evaluate: Cli, small_disk: Path, tmp_path: Path
) -> None:
    options = (*TWO, "--eps", "4/255,8/255", "--out")
    assert evaluate(*options, tmp_path / "elsewhere").code == 0
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * 40 * 1024)
    outcome = evaluate(*options, small_disk / "runs")
    assert outcome.code == 2
    (line,) = outcome.errors
    assert "no space left to write; finished cells are kept" in error_line(line)
    kept = list((small_disk / "runs").glob("cells/*/record.json"))
    assert 1 <= len(kept) < 3
    ballast.unlink()
    outcome = evaluate(*options, small_disk / "runs")
    assert outcome.code == 0, outcome.err
    assert f"{len(kept)} of them found done" in outcome.out
    assert rows_of(small_disk / "runs") == rows_of(tmp_path / "elsewhere")
