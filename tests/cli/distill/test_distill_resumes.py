"""``vlmdefend distill`` in several processes, killed and interrupted: the same weights in the end."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.cli.distillation import PAIR, SHORT, SMALL, WEIGHTS, command, environment, same_weights

# several processes


def test_torchrun_runs_the_same_command_gives_the_same_weights_and_finds_it_done(tmp_path: Path) -> None:
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "vlmdefend",
    ]
    options = ["distill", *SHORT, "--out", str(tmp_path / "two")]
    for words in (("written",), ("found done",)):
        ended = subprocess.run([*launcher, *options], env=environment(), capture_output=True, text=True, timeout=300)
        assert ended.returncode == 0, ended.stderr[-3000:]
        assert all(ended.stdout.count(word) == 1 for word in words)  # one process speaks
    one = [*command(), *SHORT, "--micro-batch", "16", "--out", str(tmp_path / "one")]
    assert subprocess.run(one, env=environment(), capture_output=True, timeout=300).returncode == 0
    assert same_weights(tmp_path / "one", tmp_path / "two")
    assert same_weights(tmp_path / "one" / "pivot", tmp_path / "two" / "pivot")


def start(out: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*command(), *options, "--out", str(out)],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it else
    )


def steps(out: Path) -> int:
    log = out / "training" / "log.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def wait_for_steps(out: Path, process: subprocess.Popen[str], before: int) -> None:
    deadline = time.monotonic() + 240
    while process.poll() is None and steps(out) <= before + 2:
        assert time.monotonic() < deadline, "no step was taken"
        time.sleep(0.01)


# interruptions


def test_a_run_that_is_killed_again_and_again_ends_with_the_bytes_of_one_that_was_not(tmp_path: Path) -> None:
    options = (*PAIR, "--limit", "80", "--held-out", "8", "--gap-images", "0", "--batch-size", "8")
    options = (*options, "--epochs-a", "1", "--epochs-b", "2", "--save-every", "2")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for out, kills in ((killed, 2), (whole, 0)):
        rng, hits = random.Random(3), 0
        for _ in range(kills):
            process = start(out, *options)
            wait_for_steps(out, process, steps(out))
            time.sleep(rng.uniform(0.0, 0.3))
            process.kill()
            process.communicate()
            hits += process.returncode == -signal.SIGKILL
        assert hits or not kills, "no kill hit a run, so this test proved nothing"
        process = start(out, *options)
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    for name in (WEIGHTS, f"pivot/{WEIGHTS}"):
        assert same_weights((whole / name).parent, (killed / name).parent)
    for name in ("training/log.jsonl", "training/state.safetensors", "training/summary.json"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes(), name


def test_ctrl_c_says_that_the_same_command_goes_on(tmp_path: Path) -> None:
    process = start(tmp_path / "out", *PAIR, *SMALL, "--epochs-a", "50")
    wait_for_steps(tmp_path / "out", process, 0)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "the same command goes on from there" in err
    assert "Traceback" not in err
