"""Measure the attack steps and print them against what an eager step costs and against the floor.

    python -m benchmarks.speed.kernels

Bytes are counted, not timed: every image-sized tensor that an operation reads or writes. Times are of this machine's
GPU where it has one (then also GB/s against a copy on the device), else of one CPU thread. The exit code is 0 either
way. Nothing is downloaded.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: its thread pool reads this once

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vlmdefend.kernels import apgd, l2, linf, margin, momentum, normalize, resize, resize_weights, start
from vlmdefend.kernels.dispatch import uses_triton

BATCH, SIDE, CLASSES, ROUNDS = 8, 224, 1000, 21
ALPHA, EPS = 1 / 255, 4 / 255


class Case(NamedTuple):
    """One kernel beside the same step as libraries write it."""

    floor: float  # bytes per value that any implementation must move
    eager: Callable[[], Any]
    ours: Callable[[], Any]
    values: int


class Traffic(TorchDispatchMode):
    """Bytes of the tensors of at least ``least`` values that operations read and write; views move nothing."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.bytes, self.operations = least, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run and count."""
        found = func(*args, **(kwargs or {}))
        fresh = found if isinstance(found, tuple | list) else (found,)
        aliases = any(
            result.alias_info is not None and not result.alias_info.is_write for result in func._schema.returns
        )
        read = [a for a in args if isinstance(a, Tensor)]
        moved = [t for t in (*read, *fresh) if isinstance(t, Tensor) and t.numel() >= self.least]
        if moved and not aliases and "empty" not in str(func) and "detach" not in str(func):
            self.bytes += sum(t.numel() * t.element_size() for t in moved)
            self.operations += 1
        return found


def cases(device: str) -> dict[str, Case]:
    """Every kernel on a batch of images."""
    torch.manual_seed(0)
    x = torch.rand(BATCH, 3, SIDE, SIDE, device=device)
    adv = (x + 0.01 * torch.randn_like(x)).clamp_(0, 1)
    old, g, m = adv.clone(), torch.randn_like(x), torch.randn_like(x)
    work, scratch, speed = adv.clone(), g.clone(), m.clone()
    size, weight = torch.full((BATCH,), 2 * EPS, device=device), torch.full((BATCH,), 0.75, device=device)
    wide = size.view(-1, 1, 1, 1)
    mean, std = (torch.rand(3, 1, 1, device=device) + 0.2 for _ in range(2))
    small = torch.rand(BATCH, 3, 32, 32, device=device)
    eye = torch.eye(32).view(1, 1, 32, 32)
    axis = resize_weights.AxisResize.of(F.interpolate(eye, (SIDE, 32), mode="bicubic")[0, 0].to(device))
    z, y = torch.randn(BATCH * 32, CLASSES, device=device), torch.zeros(BATCH * 32, dtype=torch.int64, device=device)

    def sign_step(along: Tensor) -> Tensor:
        moved = adv + ALPHA * along.sign()
        return torch.clamp(x + torch.clamp(moved - x, min=-EPS, max=EPS), min=0, max=1)

    def momentum_step() -> Tensor:
        return sign_step(g / g.abs().mean(dim=(1, 2, 3), keepdim=True) + m * 1.0)

    def l2_step() -> Tensor:
        moved = adv + 0.1 * (g / (g.flatten(1).norm(dim=1).view(-1, 1, 1, 1) + 1e-10))
        delta = moved - x
        return torch.clamp(x + delta * (0.5 / delta.flatten(1).norm(dim=1)).clamp(max=1).view(-1, 1, 1, 1), 0, 1)

    def cube(points: Tensor) -> Tensor:
        return torch.clamp(torch.min(torch.max(points, x - EPS), x + EPS), 0.0, 1.0)

    def apgd_step() -> Tensor:
        drift = adv - old
        z_ = cube(adv + wide * g.sign())
        return cube(adv + (z_ - adv) * 0.75 + drift * 0.25)

    def both_ways(function: Callable[..., Tensor], images: Tensor, *rest: Any) -> Callable[[], Tensor]:
        def run() -> Tensor:
            pixels = images.detach().requires_grad_(True)
            found = function(pixels, *rest)
            return torch.autograd.grad(found, pixels, torch.ones_like(found))[0]

        return run

    def eager_dlr(logits: Tensor, labels: Tensor) -> Tensor:
        ordered, at = logits.sort(dim=1)
        right = (at[:, -1] == labels).float()
        other = ordered[:, -2] * right + ordered[:, -1] * (1.0 - right)
        label = logits[torch.arange(len(logits), device=logits.device), labels]
        return -(label - other) / (ordered[:, -1] - ordered[:, -3] + 1e-12)

    def eager_margin(logits: Tensor, labels: Tensor) -> Tensor:
        one_hot = F.one_hot(labels, CLASSES)
        return (logits - 1e4 * one_hot).max(dim=1).values - (logits * one_hot).sum(dim=1)

    def interpolate(images: Tensor) -> Tensor:
        return (F.interpolate(images, (SIDE, SIDE), mode="bicubic") - mean) / std

    images, inside = x.numel(), small.numel() / (BATCH * 3 * SIDE * SIDE)
    return {
        "L_inf step": Case(16, lambda: sign_step(g), lambda: linf.linf_step_(work, scratch, x, ALPHA, EPS), images),
        "momentum step": Case(
            28,
            momentum_step,
            lambda: momentum.momentum_linf_step_(work, scratch, speed, x, ALPHA, EPS, 1.0),
            images,
        ),
        "L2 step": Case(28, l2_step, lambda: l2.l2_step_(work, scratch, x, 0.1, 0.5), images),
        "APGD step": Case(20, apgd_step, lambda: apgd.apgd_linf_step_(old, adv, scratch, x, size, weight, EPS), images),
        "random start": Case(
            12, lambda: torch.clamp(x + EPS * m, min=0, max=1), lambda: start.noisy(x, m, EPS), images
        ),
        "normalisation, both ways": Case(
            16,
            both_ways(lambda a: (a - mean) / std, x),
            both_ways(lambda a: normalize.normalized(a, mean, std), x),
            images,
        ),
        "resize 32 to 224 + normalisation, both ways": Case(
            8 * (1 + inside),
            both_ways(interpolate, small),
            both_ways(lambda a: resize.resized_normalized(a, axis, axis, mean, std), small),
            images,
        ),
        "margin and gradient, per logit": Case(
            8, both_ways(eager_margin, z, y), both_ways(margin.margin, z, y), z.numel()
        ),
        "DLR and gradient, per logit": Case(8, both_ways(eager_dlr, z, y), both_ways(margin.dlr, z, y), z.numel()),
    }


def seconds(run: Callable[[], Any], device: str) -> float:
    """One run: of the GPU between two events, or of the CPU."""
    if device == "cpu":
        before = time.process_time()
        run()
        return time.process_time() - before
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(10):  # one launch is too short for an event
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e4


def row(name: str, case: Case, device: str, copy: float) -> dict[str, str]:
    """What one kernel moves and takes; ``copy`` is what a copy on the device moves, in bytes per second."""
    moved = {}
    for kind, run in (("eager", case.eager), ("ours", case.ours)):
        run()
        with Traffic(min(case.values // 2, BATCH * 3 * 32 * 32)) as traffic:
            run()
        moved[kind] = traffic.bytes / case.values
    pairs = [(seconds(case.eager, device), seconds(case.ours, device)) for _ in range(ROUNDS)]
    eager, ours = (median(times) for times in zip(*pairs, strict=True))
    reached = {
        "GB/s": f"{case.floor * case.values / ours / 1e9:.0f}",
        "of a copy": f"{case.floor * case.values / ours / copy:.2f}",
    }
    fused = device != "cpu" and uses_triton(torch.zeros(1, device=device))
    return {
        "kernel": name,
        "eager, bytes": f"{moved['eager']:.0f}",
        "torch reference, bytes": "" if fused else f"{moved['ours']:.0f}",
        "fused (floor), bytes": f"{case.floor:.0f}",
        "eager, ms": f"{eager * 1e3:.3f}",
        "ours, ms": f"{ours * 1e3:.3f}",
        "eager / ours": f"{eager / ours:.1f}",
        **(reached if device != "cpu" else {}),
    }


def main() -> None:
    """Print one row per kernel."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    source, target = (torch.empty(1 << 28, dtype=torch.uint8, device=device) for _ in range(2))
    copy = 1.0
    if device == "cuda":
        copy = 2 * source.numel() / median(seconds(lambda: target.copy_(source), device) for _ in range(ROUNDS))
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, a copy moves {copy / 1e9:.0f} GB/s")
    else:
        print(f"one CPU thread, torch {torch.__version__}; no GPU, so the fused kernels are not timed")
    rows = [row(name, case, device, copy) for name, case in cases(device).items()]
    print(f"\n{tabulate(rows, headers='keys', tablefmt='github', disable_numparse=True)}", flush=True)


if __name__ == "__main__":
    main()
