"""PGD-10 with every image taking all its steps: time against the floor and torchattacks, and peak memory."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
import torchattacks
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.speed.subjects import Subject, fixed_subjects
from vlmdefend.attacks.gradient.pgd import Pgd
from vlmdefend.attacks.view import View
from vlmdefend.rng import ImageRng
from vlmdefend.types import Threat

STEPS, EPS = 10, 4 / 255
ROUNDS = {"tiny-vit": 30, "ViT-B/32": 4, "RN50": 5}  # paired rounds per model: short runs need more of them
MEMORY_TARGET = {"ViT-B/32": 0.75}  # of torchattacks' peak; 1.0 elsewhere
Run = Callable[[], object]
Row = dict[str, str]


def runs_of(subject: Subject) -> dict[str, Run]:
    """The programs that are compared, by name.

    The floor is ten times forward and ``autograd.grad`` to the pixels and nothing else: of plain open_clip with
    parameters frozen or not, and of vlmdefend's own module, whose attention is laid out for frozen parameters.
    """
    images, labels = subject.images, subject.labels
    ids = [str(i) for i in range(len(images))]
    attack, threat = Pgd(steps=STEPS, last=True), Threat("linf", EPS)

    def floor(model: Callable[[Tensor], Tensor], *, frozen: bool) -> None:
        subject.plain.requires_grad_(not frozen)
        for _ in range(STEPS):
            pixels = images.detach().requires_grad_(True)
            torch.autograd.grad(F.cross_entropy(model(pixels), labels, reduction="sum"), pixels)

    def view() -> View:
        return View(subject.ours, ImageRng(0, ids), width=len(images), stop=False)

    def peer() -> Tensor:
        subject.plain.requires_grad_(True)
        adversarial: Tensor = torchattacks.PGD(subject.plain, eps=EPS, alpha=EPS / 4, steps=STEPS)(images, labels)
        return adversarial

    return {
        "floor, open_clip frozen": lambda: floor(subject.plain, frozen=True),
        "floor, open_clip trainable": lambda: floor(subject.plain, frozen=False),
        "floor, vlmdefend's module": lambda: floor(lambda x: subject.ours(x).logits, frozen=True),
        "vlmdefend perturb": lambda: attack.perturb(view(), images, labels, threat, ImageRng(0, ids, "bench")),
        "vlmdefend __call__": lambda: attack(view(), images, labels, threat),
        "torchattacks": peer,
    }


def speed() -> list[Row]:
    """CPU seconds and paired ratios: the programs take turns, a ratio compares two runs of one round."""
    rows = []
    for subject in fixed_subjects():
        runs = runs_of(subject)
        seconds = take_turns(runs, next(n for name, n in ROUNDS.items() if subject.name.startswith(name)))
        floors = [name for name in runs if name.startswith("floor")]
        floor = min(floors, key=lambda name: median(seconds[name]))
        peer = seconds["torchattacks"]
        for name, own in seconds.items():
            to_floor = [a / b for a, b in zip(own, seconds[floor], strict=True)]
            to_peer = [a / b for a, b in zip(own, peer, strict=True)]
            met = median(to_floor) <= 1.05 and min(to_peer) <= 1.0 if name == "vlmdefend perturb" else None
            rows.append(
                {
                    "model": subject.name,
                    "program": f"{name} (fastest floor)" if name == floor else name,
                    "CPU s": f"{median(own):.3g}",
                    "/ fastest floor": spread(to_floor),
                    "/ torchattacks": spread(to_peer),
                    "target": "" if met is None else f"≤ 1.05; within the spread: {verdict(met)}",
                }
            )
    return rows


def memory() -> list[Row]:
    """Peak of the allocator's bytes above what was there before, counted from its events: no sampling, no noise."""
    rows = []
    for subject in fixed_subjects():
        peaks = {name: peak_bytes(run) for name, run in runs_of(subject).items()}
        target = next((t for name, t in MEMORY_TARGET.items() if subject.name.startswith(name)), 1.0)
        for name, peak in peaks.items():
            ratio = peak / peaks["torchattacks"]
            rows.append(
                {
                    "model": subject.name,
                    "program": name,
                    "peak MB": f"{peak / 1e6:.1f}",
                    "/ frozen floor": f"{peak / peaks['floor, open_clip frozen']:.2f}",
                    "/ torchattacks": f"{ratio:.2f}",
                    "target": f"≤ {target}: {verdict(ratio <= target)}" if name.startswith("vlmdefend") else "",
                }
            )
    return rows


def peak_bytes(run: Run) -> int:
    """The highest sum of bytes allocated and not yet freed during ``run``, on the CPU."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(file))
        events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    changes = [e for e in events if e.get("name") == "[memory]" and e["args"]["Device Type"] == 0]
    held = peak = 0
    for event in sorted(changes, key=lambda e: float(e["ts"])):
        held += int(event["args"]["Bytes"])
        peak = max(peak, held)
    return peak


def spread(values: list[float], digits: int = 3) -> str:
    """``median [min-max]``."""
    low, middle, high = (f"{value:.{digits}f}" for value in (min(values), median(values), max(values)))
    return f"{middle} [{low}-{high}]"


def verdict(met: bool) -> str:
    """In one word."""
    return "met" if met else "missed"


def take_turns(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each program in each round; every other round goes backwards. One run warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    next(iter(runs.values()))()
    for turn in range(rounds):
        for name in list(runs) if turn % 2 else reversed(runs):
            clock = time.process_time()
            runs[name]()
            seconds[name].append(time.process_time() - clock)
    return seconds
