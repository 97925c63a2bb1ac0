"""Tests that ``vlmdefend train`` in two processes, on webdataset shards, gives the bits of one process."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from vlmdefend.errors import UserError
from vlmdefend.models import load_model
from vlmdefend.progress import Progress
from vlmdefend.training import job
from vlmdefend.training.clip.training_job import DefenseTrainingJob
from vlmdefend.training.loop.state_file import load_state
from vlmdefend.training.loop.trainer_state import STATE
from vlmdefend.training.settings.train_settings import make_train_settings

NAMES = ("cat", "dog", "ship")
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    # --multi_gpu is how it starts processes itself; without a GPU they train on the CPU
    "accelerate": [
        *("accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--num_processes", "2"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
    ],
}
COUNT = 16  # a fifth is held out: 13 to train on, in batches of 4, so that the last is one image and a process has none


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards of noise in CLIP_benchmark's layout."""
    folder = tmp_path / "shards"
    (folder / "train").mkdir(parents=True)
    (folder / "classnames.txt").write_text("\n".join(NAMES))
    levels = torch.randint(0, 256, (COUNT, 40, 32, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    for shard in range(2):
        with tarfile.open(folder / "train" / f"{shard}.tar", "w") as tar:
            for number in range(shard, COUNT, 2):
                png = io.BytesIO()
                Image.fromarray(levels[number].numpy()).save(png, "PNG")
                for end, content in (("png", png.getvalue()), ("cls", str(number % len(NAMES)).encode())):
                    member = tarfile.TarInfo(f"{number:06}.{end}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder


def options(shards: Path, out: Path) -> dict[str, Any]:
    given = {"method": "pmg-aft", "model": "tiny-vit", "dataset": f"wds:{shards}", "device": "cpu", "out": out}
    return given | {
        "batch_size": 4,
        "epochs": 1,
        "held_out": 3,
        "threads": 1,
        "trains": "lora:2:0.25",
        "augment": "crop-flip",
    }


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_on_shards_give_the_bits_of_one_that_accumulates_two_halves(
    launcher: str, shards: Path, tmp_path: Path
) -> None:
    flags = [text for name, value in options(shards, tmp_path / "two").items() for text in (_flag(name), str(value))]
    start = ["-m", *LAUNCHERS[launcher], "-m", "vlmdefend", "train"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *start, *flags], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "batch 4, 2 processes" in " ".join(done.stderr.split())
    assert done.stdout.count("written, a model folder") == 1
    one = DefenseTrainingJob(make_train_settings(options(shards, tmp_path / "one") | {"micro_batch": 2}))
    assert (len(one.images), len(one.held_out)) == (13, 3)
    one.run(Progress())
    (groups, facts), (expected, expected_facts) = (
        load_state(tmp_path / name / "training" / STATE) for name in ("two", "one")
    )
    assert groups.keys() == expected.keys() == {"weights", "optimizer", "best"}
    for group, tensors in expected.items():
        for name, tensor in tensors.items():
            assert torch.equal(groups[group][name], tensor), (group, name)
    counted = [[epoch[key] for epoch in f["epochs"] for key in ("clean", "robust")] for f in (facts, expected_facts)]
    assert counted[0] == counted[1]
    hashes = [load_model(f"local-dir:{tmp_path / name}", device="cpu").weights_hash for name in ("one", "two")]
    assert hashes[0] == hashes[1] != load_model("tiny-vit", device="cpu").weights_hash


def test_a_method_that_needs_the_whole_batch_refuses_several_processes(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Two(job.Processes):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            self.count = 2

    monkeypatch.setattr(job, "Processes", Two)
    DefenseTrainingJob(make_train_settings(options(shards, tmp_path / "out")))
    with pytest.raises(UserError, match="must come in one piece: run one process without --micro-batch"):
        DefenseTrainingJob(make_train_settings(options(shards, tmp_path / "out") | {"method": "at"}))
    assert not (tmp_path / "out").exists()


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
