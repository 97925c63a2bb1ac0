"""Several processes, as torchrun starts them, against one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.training.conftest import build_run
from vlmdefend.errors import UserError
from vlmdefend.training.loop.processes import Processes, deterministic
from vlmdefend.training.loop.state_file import load_state
from vlmdefend.training.loop.trainer_state import STATE

pytestmark = pytest.mark.numerics

ROOT = Path(__file__).parents[3]


def torchrun(folders: dict[str, Path], out: Path, images: int) -> None:
    out.mkdir()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "tests.training.train_here", str(folders["rn"].parent), str(out), str(images)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("images", [24, 17])  # 17: the last batch is one image, and a process has none
def test_two_processes_give_the_bits_of_one_that_accumulates_two_halves(
    folders: dict[str, Path], tmp_path: Path, images: int
) -> None:
    torchrun(folders, tmp_path / "two", images)
    one = build_run(folders, tmp_path / "one", images=images, judged=True, micro_batch=4)
    one.run()
    (groups, facts), (expected, expected_facts) = (load_state(tmp_path / name / STATE) for name in ("two", "one"))
    assert groups.keys() == expected.keys() == {"weights", "optimizer", "best", "pivot"}
    for group, tensors in expected.items():
        for name, tensor in tensors.items():
            assert torch.equal(groups[group][name], tensor), (group, name)
    held_out = [
        [epoch[key] for epoch in found["epochs"] for key in ("clean", "robust")] for found in (facts, expected_facts)
    ]
    assert held_out[0] == held_out[1]


def test_one_process_needs_no_launcher() -> None:
    processes = Processes("cpu")
    assert (processes.rank, processes.count, processes.is_main) == (0, 1, True)
    assert processes.sum_numbers({"a": 1.5}) == {"a": 1.5}


def test_float16_on_a_cpu_is_refused() -> None:
    with pytest.raises(UserError, match="--precision float16: needs a GPU"):
        Processes("cpu", "float16")


def test_a_device_that_is_not_there_is_one_sentence() -> None:
    with pytest.raises(UserError, match="--device cpux: torch cannot use it here"):
        Processes("cpux")


def test_determinism_is_given_back() -> None:
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.allow_tf32
    with deterministic():
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.allow_tf32
    assert (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.allow_tf32) == before
