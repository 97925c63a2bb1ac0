"""mi, di and ti with every step taken, against the forwards and backwards that they need and nothing else."""

from __future__ import annotations

from statistics import median

import torch
import torch.nn.functional as F

from benchmarks.speed.fixed import Row, Run, spread, take_turns, verdict
from benchmarks.speed.labelled import BATCH, Labelled, labelled
from vlmdefend.attacks import ATTACKS
from vlmdefend.rng import ImageRng
from vlmdefend.types import Threat

STEPS, EPS, ROUNDS = 10, 8 / 255, 15


def transfer() -> list[Row]:
    """CPU time of ``perturb`` on 64 images of 32 pixels, as paired ratios to the floor of the same round."""
    subject = labelled("undefended", 120)
    subject.images, subject.labels = subject.images[:BATCH], subject.labels[:BATCH]
    runs: dict[str, Run] = {"floor": lambda: _floor(subject)}
    for name in ("mi", "di", "ti"):
        runs[name] = lambda name=name: _perturb(subject, name)
    seconds = take_turns(runs, ROUNDS)
    rows = []
    for name in ("mi", "di", "ti"):
        ratios = [a / b for a, b in zip(seconds[name], seconds["floor"], strict=True)]
        met = verdict(median(ratios) <= 1.15)
        rows.append({"attack": name, "/ floor": spread(ratios), "target": f"≤ 1.15: {met}"})
    return rows


def _perturb(subject: Labelled, name: str) -> torch.Tensor:
    view, threat = subject.view(stop=False), Threat("linf", EPS)
    attack = ATTACKS.create(name, steps=STEPS)
    return attack.perturb(view, subject.images, subject.labels, threat, ImageRng(0, subject.ids, "bench"))


def _floor(subject: Labelled) -> None:
    for _ in range(STEPS):
        pixels = subject.images.detach().requires_grad_(True)
        loss = F.cross_entropy(subject.ours(pixels).logits, subject.labels, reduction="sum")
        torch.autograd.grad(loss, pixels)
