"""``vlmdefend attack`` and ``evaluate --adversarial`` as a shell sees them."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.cli.conftest import Cli, Outcome, error_line, one_sentence
from vlmdefend.evaluation.set_format import INDEX, MANIFEST
from vlmdefend.evaluation.verdict import Judge

QUICK = ("--limit", "16", "--batch-size", "8", "--device", "cpu")
LONG = ("--limit", "120", "--batch-size", "8", "-a", "pgd:steps=20", "--eps", "8/255", "--threads", "1", "--png")
LONG = (*LONG, "--device", "cpu")
Sets = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def attack(cli: Cli, tmp_path: Path) -> Sets:
    """``attack("set", "--eps", "4/255")`` into a folder of ``tmp_path``."""
    return lambda name, *options: cli("attack", *QUICK, *options, "--out", tmp_path / name)


@pytest.fixture
def refused(attack: Sets, tmp_path: Path) -> Callable[..., str]:
    """The one sentence with which ``attack`` refuses these options; nothing is written."""

    def call(*options: str) -> str:
        outcome = attack("refused", *options)
        assert outcome.code == 2, outcome
        assert outcome.out == ""
        assert not (tmp_path / "refused" / MANIFEST).exists()
        return one_sentence(outcome)

    return call


def files_of(folder: Path) -> dict[str, bytes]:
    """Path -> content, without the record, which holds the time."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {str(f.relative_to(folder)): f.read_bytes() for f in files if "cells" not in f.relative_to(folder).parts}


# the verdict


def test_the_verdict_is_short_and_says_what_the_files_hold(attack: Sets, tmp_path: Path) -> None:
    outcome = attack("set", "--eps", "8/255", "--png")
    assert outcome.code == 0, outcome.err
    assert all(len(line) <= 80 for line in outcome.out.splitlines())
    assert len(outcome.out.splitlines()) <= 16
    rows = [json.loads(line) for line in (tmp_path / "set" / INDEX).read_text().splitlines()]
    right = sum(row["clean_prediction"] == row["label"] for row in rows)
    said = " ".join(outcome.out.split())
    assert f"{right} of 16 right" in said
    assert f"fooled {sum(row['fooled'] for row in rows)} of {right};" in said
    assert f"largest distance {max(row['distance'] for row in rows):.6g}" in said
    assert "16 files" in said
    assert "0 outside the budget" in said
    assert Image.open(tmp_path / "set" / "contact_sheet.png").size[0] > 400


def test_the_set_is_a_run_folder_that_report_shows(attack: Sets, cli: Cli, tmp_path: Path) -> None:
    attack("set", "--eps", "8/255")
    outcome = cli("report", tmp_path / "set")
    assert outcome.code == 0
    assert "pgd steps=10" in outcome.out


def test_a_dry_run_writes_nothing(attack: Sets, tmp_path: Path) -> None:
    outcome = attack("set", "--eps", "8/255", "--dry-run")
    assert outcome.code == 0
    assert "Nothing was computed" in outcome.out
    assert not (tmp_path / "set").exists()


def test_help_shows_the_options(cli: Cli) -> None:
    outcome = cli("attack", "--help")
    assert outcome.code == 0
    assert all(option in outcome.out for option in ("--model", "--eps", "--png", "--attacker", "--out"))


def test_a_model_that_is_never_right_makes_a_set_without_a_picture(attack: Sets, tmp_path: Path) -> None:
    names = ("trousers", "t-shirt", "ankle boot", "bag", "sandal", "coat", "sneaker", "trouser", "shirt", "dress")
    (tmp_path / "names.txt").write_text("\n".join(names))  # every class has another one's name
    outcome = attack("set", "--eps", "4/255", "--limit", "1", "--classes", str(tmp_path / "names.txt"), "--png")
    assert outcome.code == 0, outcome.err
    assert "0 of 1 right" in outcome.out
    assert "the model was right on no image" in outcome.out
    assert not (tmp_path / "set" / "contact_sheet.png").exists()


# what is refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "--eps"),
        (("--eps", "2/255,4/255"), "--eps has several values"),
        (("--eps", "4/255", "--model", "tiny-vit,tiny-rn"), "--model has several values"),
        (("--eps", "4/255", "--attack", "pgd,fgsm"), "--attack has several values"),
        (("--eps", "4/255", "--seed", "0,1"), "--seed has several values"),
        (("--attack", "none"), "--attack none: leaves the images as they are"),
        (("--eps", "4"), "did you mean 4/255?"),
        (("--eps", "4/255", "--model", "tiny-vip"), "tiny-vit"),
        (("--eps", "4/255", "--attack", "pdg"), "pgd"),
        (("--eps", "4/255", "--norm", "l3"), "--norm"),
    ],
)
def test_what_is_not_one_set_is_refused(refused: Callable[..., str], options: tuple[str, ...], words: str) -> None:
    assert words in refused(*options)


def test_a_folder_holds_one_set(attack: Sets, tmp_path: Path) -> None:
    assert attack("set", "--eps", "8/255").code == 0
    before = files_of(tmp_path / "set")
    outcome = attack("set", "--eps", "4/255")
    assert outcome.code == 2
    assert "holds another set or run (it differs in eps); give a folder of its own" in one_sentence(outcome)
    assert files_of(tmp_path / "set") == before


def test_a_folder_of_evaluate_is_left_alone(attack: Sets, cli: Cli, tmp_path: Path) -> None:
    assert cli("evaluate", *QUICK, "--eps", "4/255", "-a", "fgsm", "--out", tmp_path / "set").code == 0
    assert "holds another set or run" in one_sentence(attack("set", "--eps", "4/255"))


def test_a_folder_without_a_set_is_refused_by_evaluate(cli: Cli, tmp_path: Path) -> None:
    for folder, words in ((tmp_path / "no", "no such folder"), (tmp_path, "holds no set of `vlmdefend attack`")):
        outcome = cli("evaluate", "--adversarial", folder, "--out", tmp_path / "runs")
        assert outcome.code == 2
        assert words in one_sentence(outcome)


@pytest.mark.parametrize("option", [("--eps", "8/255"), ("--attack", "pgd"), ("--limit", "4"), ("--steps", "3")])
def test_what_a_set_has_decided_is_refused_beside_it(
    option: tuple[str, str], attack: Sets, cli: Cli, tmp_path: Path
) -> None:
    attack("set", "--eps", "8/255")
    outcome = cli("evaluate", "--adversarial", tmp_path / "set", *option, "--out", tmp_path / "runs")
    assert outcome.code == 2
    assert option[0] in (line := one_sentence(outcome))
    assert "leave it out with --adversarial" in line


def test_a_damaged_file_is_one_sentence_and_exit_code_2(attack: Sets, cli: Cli, tmp_path: Path) -> None:
    attack("set", "--eps", "8/255")
    file = tmp_path / "set" / "images-00001.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-9])  # found before anything is computed
    command = ("evaluate", "--adversarial", tmp_path / "set", "--batch-size", "8", "--out", tmp_path / "runs")
    outcome = cli(*command)
    assert outcome.code == 2
    assert "images-00001.safetensors: is not what `vlmdefend attack` wrote" in one_sentence(outcome)
    file.write_bytes(content[:-1] + b"?")  # found when it is read
    outcome = cli(*command)
    assert outcome.code == 2
    (line,) = outcome.errors
    assert "images-00001.safetensors: is not what `vlmdefend attack` wrote" in error_line(line)


# the matrix


def test_the_matrix_has_a_row_per_set_and_a_column_per_target_in_80_columns(
    attack: Sets, cli: Cli, tmp_path: Path
) -> None:
    for model in ("tiny-vit", "tiny-rn"):
        assert attack(model, "--model", model, "--eps", "8/255").code == 0
    sets = f"{tmp_path / 'tiny-vit'},{tmp_path / 'tiny-rn'}"
    options = ("--model", "tiny-vit,tiny-rn", "--defense", "none,jpeg", "--batch-size", "8")
    outcome = cli("evaluate", "--adversarial", sets, *options, "--out", tmp_path / "runs")
    assert outcome.code == 0, outcome.err
    assert all(len(line) <= 80 for line in outcome.out.partition("\n8 cells in")[0].splitlines())
    lines = [line for line in outcome.out.splitlines() if line.startswith(("clean", "tiny-vit:pgd", "tiny-rn:pgd"))]
    assert sum(line.count("[") for line in lines) == 8  # robust accuracy with its interval
    again = cli("evaluate", "--adversarial", sets, *options, "--out", tmp_path / "runs")
    assert "8 of them found done" in again.out
    report = cli("report", tmp_path / "runs")
    assert "saved source=tiny-rn:pgd:steps=10" in " ".join(report.out.split())
    assert "whitebox and adaptive attackers" in " ".join(report.out.split())


# resuming


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
    lost: str, attack: Sets, tmp_path: Path
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


def test_what_was_made_of_a_set_is_made_anew_with_it(attack: Sets, tmp_path: Path) -> None:
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
    attack: Sets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = attack("set", "--eps", "8/255", "--png")
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.*") if file.name != "lock"}
    monkeypatch.setattr(Judge, "run", lambda *args: pytest.fail("computed again"))
    monkeypatch.setattr(Judge, "answer", lambda *args: pytest.fail("predicted again"))
    second = attack("set", "--eps", "8/255", "--png")
    assert second.code == 0
    assert "found done" in second.out
    assert second.out.partition("\n\n")[0] == first.out.partition("\n\n")[0]
    assert {file: file.stat().st_mtime_ns for file in before} == before


def test_png_files_can_be_added_to_a_finished_set(attack: Sets, tmp_path: Path) -> None:
    attack("set", "--eps", "8/255")
    before = files_of(tmp_path / "set")
    attack("set", "--eps", "8/255", "--png")
    after = files_of(tmp_path / "set")
    assert {name: content for name, content in after.items() if not name.startswith("png")} == before
    assert len(after) == len(before) + 17


def test_a_disk_that_fills_up_is_one_sentence_and_the_same_command_goes_on(
    attack: Sets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import vlmdefend.evaluation.crafting as crafting

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
