"""Two processes make what one makes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.training.adaptation.domains import saved_teacher, write_domains


def test_two_processes_give_the_student_of_one(tmp_path: Path) -> None:
    root, teacher = write_domains(tmp_path / "domains"), saved_teacher(tmp_path / "teacher")
    options = ["--source", f"folder:{root / 'light'}", "--target", f"folder:{root / 'dark'}", "--teacher", teacher]
    options += ["--batch-norm", "frozen", "--augment", "shift", "--steps", "2", "--epochs-student", "1"]
    options += ["--batch-size-student", "6", "--backbone", "tiny-cnn", "--lr-student", "0.2", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for count in (1, 2):
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "-m", "vlmdefend"]
        command = [sys.executable, *start, "urda-train", *options, "--out", str(tmp_path / str(count))]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("1", "2"))
    begun = load_file(tmp_path / "teacher" / "model.safetensors")
    for name in one:
        assert one[name].numpy() == pytest.approx(two[name].numpy(), abs=1e-6), name
    assert any(float((one[name] - begun[name]).abs().max()) > 1e-3 for name in one if name.endswith("weight"))
