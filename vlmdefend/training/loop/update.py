"""One step of the weights: gradients accumulated over micro-batches and processes, then the optimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import groupby
from typing import Any, cast

import torch
from torch import nn

from vlmdefend.defenses.training_time.base import Objective, Student, Teacher
from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng
from vlmdefend.training.loop.processes import is_out_of_memory
from vlmdefend.training.loop.stage import Optimization
from vlmdefend.training.loop.student import TrainedStudent
from vlmdefend.types import Batch


class Accumulator:
    """Accumulates the gradients of a global batch over micro-batches and processes."""

    def __init__(self, student: TrainedStudent, teacher: Teacher | None, options: Optimization) -> None:
        self.student, self.teacher, self.options = student, teacher, options
        self.micro_batch = options.micro_batch
        self.halved: list[int] = []  # micro-batches that memory forced

    def gradients(self, objective: Objective, batch: Batch, rng: ImageRng) -> dict[str, float]:
        """Leaves the reduced gradient of the global batch in ``.grad`` and returns the mean losses and metrics.

        Args:
            objective: what is minimised.
            batch: this process's share, on its device; may be empty.
            rng: one stream per image of ``batch``, fresh: an attempt that fails for memory draws them again.

        Raises:
            UserError: a single image does not fit into memory.
        """
        processes = self.student.processes
        parameters = list(self.student.parameters.values())
        while True:
            for parameter in parameters:
                parameter.grad = None
            try:
                sums = self._accumulate(objective, batch, rng.child("step"))
                break
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
            self._halve(len(batch.ids), objective)
        processes.sum_gradients(parameters)
        sums = processes.sum_numbers(sums)
        count = sums.pop("images", 0.0)
        if not count:
            raise UserError("no image of this batch could be read; mend the data set.")
        if objective.reduction == "mean":
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.div_(count)
        return {name: value / count for name, value in sums.items()}

    def _accumulate(self, objective: Objective, batch: Batch, rng: ImageRng) -> dict[str, float]:
        sums: dict[str, float] = {"images": float(len(batch.ids))}
        size = self.micro_batch or max(1, len(batch.ids))
        for first in range(0, len(batch.ids), size):
            index = list(range(first, min(first + size, len(batch.ids))))
            part = Batch([batch.ids[i] for i in index], batch.images[index], batch.labels[index])
            student = cast(Student, self.student)  # an objective meets the kind of student that its command trains
            terms = objective.losses(student, self.teacher, part, rng.select(index))
            total = torch.stack(list(terms.losses.values())).sum()
            torch.autograd.backward(self.student.processes.scaler.scale(total))
            self.student.forget()
            for name, values in (terms.losses | terms.metrics).items():
                sums[name] = sums.get(name, 0.0) + float(values.detach().double().sum())
            sums["loss"] = sums.get("loss", 0.0) + float(total.detach())
        return sums

    def _halve(self, images: int, objective: Objective) -> None:
        self.student.forget()
        now = min(self.micro_batch or images, images)
        if now <= 1:
            raise UserError("a single image does not fit into memory in training; take a smaller model or device.")
        if self.student.classifier.batch_norm == "train":
            raise UserError(
                "out of memory, and with --batch-norm train the micro-batch cannot shrink without changing the "
                f"result; give a smaller {self.options.batch_option}, or --batch-norm frozen."
            )
        if objective.whole_batch:
            raise UserError(
                f"out of memory, and {objective.name} needs the whole batch at once; give a smaller "
                f"{self.options.batch_option}."
            )
        self.micro_batch = (now + 1) // 2
        self.halved.append(self.micro_batch)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def make_optimizer(
    parameters: Mapping[str, nn.Parameter], options: Optimization, factors: Mapping[str, float] | None = None
) -> torch.optim.Optimizer:
    """Returns a new optimizer; its rate is set at every step, times the factor of each parameter."""
    factor_of = factors or {}
    groups: list[dict[str, Any]] = [  # neighbours of one factor, so that the order of parameters stays
        {"params": [parameters[name] for name in names], "factor": factor}
        for factor, names in groupby(parameters, key=lambda name: factor_of.get(name, 1.0))
    ]
    if options.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, weight_decay=options.weight_decay)
    return torch.optim.SGD(
        groups, lr=0.0, momentum=options.momentum, weight_decay=options.weight_decay, nesterov=options.nesterov
    )


def update(student: TrainedStudent, optimizer: torch.optim.Optimizer, rate: float, clip: float | None) -> float:
    """Takes one step along the gradients; returns the gradient's norm before clipping.

    Weights are left as they are, and not-a-number or infinity returned, if the gradient is not finite.
    """
    scaler = student.processes.scaler
    if scaler.is_enabled():
        scaler.unscale_(optimizer)
    gradients = [p.grad for p in student.parameters.values() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    value = float(norm)
    if math.isfinite(value):
        if clip is not None:
            torch.nn.utils.clip_grads_with_norm_(student.parameters.values(), clip, norm)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["factor"]
    if math.isfinite(value) or scaler.is_enabled():
        scaler.step(optimizer)  # leaves out a step whose gradients overflowed
        scaler.update()
    scale = student.parameters.get("logit_scale")
    if scale is not None:
        with torch.no_grad():
            scale.clamp_(0.0, math.log(100.0))
    return value
