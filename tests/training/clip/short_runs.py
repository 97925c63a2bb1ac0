"""Training runs of a few steps, and comparisons of their weights."""

from __future__ import annotations

from dataclasses import replace

import torch

from tests.training.conftest import EPS, MakeRun
from vlmdefend.defenses.training_time.hpt_gpd import HptGpd
from vlmdefend.training.loop.stage import Stage
from vlmdefend.training.loop.trainer import Trainer
from vlmdefend.training.loop.weight_averages import Weights, copied

EPOCHS = 3


def result(run: Trainer) -> Weights:
    run.run()
    return copied(run.student.weights())


def whole(make_run: MakeRun, name: str, **options: object) -> tuple[Trainer, Weights]:
    run = make_run(name, **options)
    return run, result(run)


def same(first: Weights, second: Weights) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def close(first: Weights, second: Weights, atol: float = 1e-6) -> bool:
    return all(torch.allclose(first[name], second[name], atol=atol, rtol=1e-4) for name in first)


def stage_b(**changes: object) -> Stage:
    return replace(Stage(name="b", objective=HptGpd(eps=EPS, alpha=EPS), epochs=EPOCHS, rate=0.05), **changes)
