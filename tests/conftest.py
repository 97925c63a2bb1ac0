"""Shared by all tests: one torch thread, which is faster on small models and far faster on a busy machine."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test waits for a hub

import torch

torch.set_num_threads(1)
