"""``vlmdefend attack`` killed, interrupted or run twice: the bytes of one set that was not."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.conftest import Cli, files_of, one_sentence
from vlmdefend.evaluation.adversarial_sets.set_format import INDEX, MANIFEST
from vlmdefend.evaluation.cell.defended_model import DefendedModel
from vlmdefend.evaluation.cell.evaluator import CellEvaluator

LONG = ("--limit", "120", "--batch-size", "8", "-a", "pgd:steps=20", "--eps", "8/255", "--threads", "1", "--png")
LONG = (*LONG, "--device", "cpu")


def start(out: Path) -> subprocess.Popen[str]:
    """The long command as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", "from vlmdefend.cli.main import run; run()", "attack", *LONG, "--out", str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def progress(out: Path) -> int:
    """Grows with each file of images, and with each PNG."""
    return len(list(out.glob("images-*.safetensors"))) + len(list(out.glob("png/*.png")))


def wait_for(out: Path, process: subprocess.Popen[str], more_than: int) -> None:
    deadline = time.monotonic() + 240
    while process.poll() is None and progress(out) <= more_than:
        assert time.monotonic() < deadline, "nothing was written"
        time.sleep(0.005)


def test_a_set_that_was_killed_again_and_again_has_the_bytes_of_one_that_was_not(cli: Cli, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert cli("attack", *LONG, "--out", whole).code == 0
    rng = random.Random(7)
    hits = 0
    for _ in range(3):
        process = start(killed)
        wait_for(killed, process, progress(killed))
        time.sleep(rng.uniform(0.0, 0.3))
        process.kill()
        process.communicate()
        hits += process.returncode == -signal.SIGKILL and progress(killed) > 0 and not (killed / MANIFEST).exists()
    assert hits, "no kill hit a half-done set, so this test proved nothing"
    outcome = cli("attack", *LONG, "--out", killed)
    assert outcome.code == 0, outcome.err
    assert files_of(killed) == files_of(whole)
    assert not list(killed.rglob("*.part"))


@pytest.mark.parametrize("lost", [MANIFEST, INDEX + "|" + MANIFEST, "png", "contact_sheet.png"])
def test_what_a_kill_at_the_end_leaves_undone_is_done_by_the_same_command(
    lost: str, attack: Cli, tmp_path: Path
) -> None:
    options = ("--eps", "8/255", "--png")
    attack("set", *options)
    whole = files_of(tmp_path / "set")
    for name in lost.split("|"):
        path = tmp_path / "set" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (tmp_path / "set" / f".{MANIFEST}.part").write_bytes(b"half")
    assert attack("set", *options).code == 0
    (tmp_path / "set" / f".{MANIFEST}.part").unlink(missing_ok=True)
    assert files_of(tmp_path / "set") == whole


def test_what_was_made_of_a_set_is_made_anew_with_it(attack: Cli, tmp_path: Path) -> None:
    attack("set", "--eps", "8/255", "--png")
    whole = files_of(tmp_path / "set")
    index = tmp_path / "set" / "png" / INDEX
    index.write_text(index.read_text().replace('"fooled": true', '"fooled": false'))
    (tmp_path / "set" / MANIFEST).unlink()
    attack("set", "--eps", "8/255", "--png")
    assert files_of(tmp_path / "set") == whole


def test_ctrl_c_keeps_finished_shards_and_says_how_to_go_on(cli: Cli, tmp_path: Path) -> None:
    process = start(tmp_path / "set")
    wait_for(tmp_path / "set", process, 0)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "interrupted; what is done is kept in" in err
    assert "Traceback" not in err
    assert progress(tmp_path / "set")
    half = cli("evaluate", "--adversarial", tmp_path / "set", "--out", tmp_path / "runs")
    assert half.code == 2
    assert "is half crafted" in one_sentence(half)


def test_a_finished_set_is_found_and_nothing_is_computed(
    attack: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = attack("set", "--eps", "8/255", "--png")
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.*") if file.name != "lock"}
    monkeypatch.setattr(CellEvaluator, "run", lambda *args: pytest.fail("computed again"))
    monkeypatch.setattr(DefendedModel, "predict", lambda *args: pytest.fail("predicted again"))
    second = attack("set", "--eps", "8/255", "--png")
    assert second.code == 0
    assert "found done" in second.out
    assert second.out.partition("\n\n")[0] == first.out.partition("\n\n")[0]
    assert {file: file.stat().st_mtime_ns for file in before} == before


def test_png_files_can_be_added_to_a_finished_set(attack: Cli, tmp_path: Path) -> None:
    attack("set", "--eps", "8/255")
    before = files_of(tmp_path / "set")
    attack("set", "--eps", "8/255", "--png")
    after = files_of(tmp_path / "set")
    assert {name: content for name, content in after.items() if not name.startswith("png")} == before
    assert len(after) == len(before) + 17


def test_a_disk_that_fills_up_is_one_sentence_and_the_same_command_goes_on(
    attack: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import vlmdefend.evaluation.adversarial_sets.crafting as crafting

    write = crafting.write_whole

    def full(file: Path, content: bytes) -> None:
        if file.name.startswith("images-00001"):
            raise OSError(28, "No space left on device")
        write(file, content)

    monkeypatch.setattr(crafting, "write_whole", full)
    outcome = attack("set", "--eps", "8/255")
    assert outcome.code == 2
    assert "no space left to write" in outcome.errors[0]
    monkeypatch.setattr(crafting, "write_whole", write)
    assert attack("set", "--eps", "8/255").code == 0
    attack("whole", "--eps", "8/255")
    assert files_of(tmp_path / "set") == files_of(tmp_path / "whole")
