"""Estimates the cost of a training run before it starts: passes, and memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vlmdefend.training.loop.stage import Optimization, Stage
from vlmdefend.training.loop.student import TrainedStudent

COPIES = 5  # of the trained weights beside themselves: vanilla, average, pivot, best, and one while saving


class StageCost(NamedTuple):
    """Epochs, steps, images, warm-up and passes of one stage."""

    stage: str
    epochs: int
    steps: int
    warm_up: int
    forward_backwards: int  # of one image, through the target's image encoder
    proxy_forwards: int  # of one image


class MemoryCost(NamedTuple):
    """Bytes, estimated: weights of both models, what training adds to the target's, and one micro-batch."""

    weights: int
    training: int
    activations: int

    @property
    def total(self) -> int:
        """The sum of all parts, in bytes."""
        return sum(self)


def stage_cost(stage: Stage, options: Optimization, images: int) -> StageCost:
    """Computes the cost of a stage from counts alone."""
    steps = stage.epochs * -(-images // options.batch_size)
    seen, cost = stage.epochs * images, stage.objective.cost
    warm_up = options.warm_up_of(steps)
    return StageCost(
        stage.name,
        stage.epochs,
        steps,
        warm_up,
        seen * cost.forward_backwards + images * cost.once,
        seen * cost.teacher_forwards,
    )


def memory_cost(student: TrainedStudent, other: torch.nn.Module, options: Optimization, side: int) -> MemoryCost:
    """Estimates memory from one image: its saved activations are counted and multiplied by the batch.

    Args:
        side: of the square images.
    """

    def size(module: torch.nn.Module) -> int:
        return sum(t.numel() * t.element_size() for t in module.state_dict().values())

    weights = size(student.classifier.clip) + size(other)
    trained = sum(p.numel() * p.element_size() for p in student.parameters.values())
    moments = {"sgd": int(options.momentum > 0), "adamw": 2}[options.optimizer]
    saved: dict[int, int] = {}
    owned = {p.untyped_storage().data_ptr() for p in student.classifier.clip.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    image = torch.zeros(1, 3, side, side, device=student.processes.device)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = student(image)
    del outputs
    at_once = -(-options.batch_size // student.processes.count)
    micro_batch = min(options.micro_batch or at_once, at_once)
    return MemoryCost(weights, trained * (1 + moments + COPIES), sum(saved.values()) * micro_batch)
