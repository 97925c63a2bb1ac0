"""A distillation that takes seconds, in this process or in one of its own."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

PAIR = ("--proxy", "tiny-vit", "--target", "tiny-rn", "--device", "cpu")
SMALL = ("--limit", "80", "--held-out", "16", "--gap-images", "8", "--batch-size", "32")
SHORT = (*PAIR, *SMALL, "--epochs-a", "1", "--epochs-b", "1")
WEIGHTS = "open_clip_model.safetensors"


def command() -> list[str]:
    return [sys.executable, "-m", "vlmdefend", "distill"]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def same_weights(first: Path, second: Path) -> bool:
    one, two = load_file(first / WEIGHTS), load_file(second / WEIGHTS)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
