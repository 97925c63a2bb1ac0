"""The model in training: its forward that is trained, its forward that is attacked, and one step of its weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from vlmdefend.defenses.training_time.base import Objective, Teacher
from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng
from vlmdefend.training.clip.adapters import dropped_out
from vlmdefend.training.clip.classifier import TrainedClassifier, batch_norm_buffers
from vlmdefend.training.loop.processes import Processes, is_out_of_memory
from vlmdefend.training.loop.stage import Optimization
from vlmdefend.types import Batch, Outputs


class TrainedStudent:
    """Satisfies :class:`~vlmdefend.defenses.training_time.base.Student`.

    Args:
        classifier: the model.
        parameters: those of it that train, by name.
        processes: give the precision of the training forward.
    """

    def __init__(self, classifier: TrainedClassifier, parameters: dict[str, nn.Parameter], processes: Processes):
        self.classifier, self.parameters, self.processes = classifier, parameters, processes
        self.iteration = 0  # steps of this stage that were taken: what a schedule inside an objective depends on
        self.carried: dict[str, Tensor] = {}  # what an objective leaves for its next step, until the epoch ends
        self.rate_factors: dict[str, float] = {}  # of parameters that learn slower or faster than the stage's rate

    def __call__(self, images: Tensor) -> Outputs:
        """The forward that is trained, in training precision; outputs in float32."""
        with self.processes.autocast(), dropped_out(self.classifier, self.iteration):
            found = self.classifier.training_outputs(images)
        return Outputs(found.logits.float(), None if found.features is None else found.features.float())

    def attacked(self, images: Tensor, classes: Tensor | None = None) -> Tensor:
        """The logits that an attack differentiates: float32 whatever the precision of training.

        Args:
            classes: (C, D) unit class features in place of the model's own.
        """
        return self.classifier.logits(self.classifier.features(images), classes)

    def attacked_features(self, images: Tensor) -> Tensor:
        """(B, D) features that an attack differentiates: as :meth:`attacked`."""
        return self.classifier.features(images)

    def with_patches(self, images: Tensor) -> tuple[Outputs, Tensor]:
        """The forward that is trained, with (B, N, D) what it says of each place; in float32."""
        with self.processes.autocast(), dropped_out(self.classifier, self.iteration):
            found, patches = self.classifier.with_patches(images)
        return Outputs(
            found.logits.float(), None if found.features is None else found.features.float()
        ), patches.float()

    @property
    def class_features(self) -> Tensor:
        """(C, D) unit text features, without gradient."""
        return self.classifier.text_features

    @property
    def hand_features(self) -> Tensor:
        """(C, D) unit text features of the run's templates, where a context is learned in their place."""
        return self.classifier.hand_features

    @property
    def context(self) -> Tensor:
        """(M, W), or (C, M, W), the context that is learned, detached."""
        context = self.classifier.model.context
        if context is None:
            raise UserError("this model has no learned context; train one with --trains context:M.")
        return context.detach()

    def classes_of(self, context: Tensor) -> Tensor:
        """(C, D) unit class features of another context, with its gradient; in float32."""
        return self.classifier.classes_of(context)

    def answers(self, features: Tensor) -> Tensor:
        """(B, D) image features -> (B, C) logits that carry gradients to what trains of the text side."""
        return self.classifier.logits(features, self.classifier.class_features())

    def refresh(self) -> None:
        """Bring up to date what is computed from weights that were just changed."""
        self.classifier.refresh()

    def forget(self) -> None:
        """Drop what a forward kept for its backward."""
        self.classifier.forget()

    def weights(self) -> dict[str, Tensor]:
        """What training changes, by name: parameters, and BatchNorm's running statistics where they train."""
        found: dict[str, Tensor] = {name: p.detach() for name, p in self.parameters.items()}
        if self.classifier.batch_norm == "train":
            found |= batch_norm_buffers(self.classifier.clip)
        return found


class AutocastTeacher:
    """A frozen model in the precision of the training forward."""

    def __init__(self, classifier: TrainedClassifier, processes: Processes) -> None:
        self.classifier, self.processes = classifier, processes

    def __call__(self, images: Tensor) -> Outputs:
        """Without gradient, in float32 outside."""
        with torch.no_grad(), self.processes.autocast():
            found = self.classifier(images)
        return Outputs(found.logits.float(), None if found.features is None else found.features.float())

    def with_patches(self, images: Tensor) -> tuple[Outputs, Tensor]:
        """The same, with (B, N, D) what the model says of each place."""
        with torch.no_grad(), self.processes.autocast():
            found, patches = self.classifier.with_patches(images)
        return Outputs(
            found.logits.float(), None if found.features is None else found.features.float()
        ), patches.float()


class Accumulator:
    """Gradients of a global batch, micro-batch by micro-batch, process by process."""

    def __init__(self, student: TrainedStudent, teacher: Teacher | None, options: Optimization) -> None:
        self.student, self.teacher, self.options = student, teacher, options
        self.micro_batch = options.micro_batch
        self.halved: list[int] = []  # micro-batches that memory forced

    def gradients(self, objective: Objective, batch: Batch, rng: ImageRng) -> dict[str, float]:
        """Leave the reduced gradient of the global batch in ``.grad``; the means of losses and metrics over it.

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
            terms = objective.losses(self.student, self.teacher, part, rng.select(index))
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
    """A fresh one; its rate is set at every step, times the factor of each parameter (1 where none is given)."""
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
    """One step of the weights along the gradients that are there; the gradient's norm before clipping.

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
