"""The training loop: stages of epochs of steps, saved so that a resumed run gives the same bits."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from vlmdefend.defenses.training_time.base import Teacher
from vlmdefend.errors import UserError
from vlmdefend.progress import Progress
from vlmdefend.rng import ImageRng
from vlmdefend.training.loop.data import Images, batches
from vlmdefend.training.loop.log import Log, Tracking
from vlmdefend.training.loop.results import Accuracies, EpochResult, HitCount
from vlmdefend.training.loop.stage import Optimization, Stage
from vlmdefend.training.loop.student import TrainedStudent
from vlmdefend.training.loop.trainer_state import TrainerPosition, TrainerState
from vlmdefend.training.loop.update import Accumulator, make_optimizer, update
from vlmdefend.training.loop.weight_averages import Weights, average_, copied, pull_, put_
from vlmdefend.types import Batch

SECONDS_BETWEEN_STATES = 300


@dataclass
class Trainer:
    """Runs all stages, resumed from ``folder`` if it holds a state.

    Args:
        student: begins with the vanilla weights; ends with those of the last epoch.
        teacher: frozen, or None.
        images: what is trained on.
        stages: in order.
        options: how the weights move.
        folder: of the state and the log; exists.
        measure: returns clean and robust accuracy on the held-out images; None: nothing is held out.
        count: returns further counts at the end of an epoch, by name; they choose nothing.
        progress: receives steps, epochs and notes.
        tracking: where numbers go beside the log.
        pivot: weights of a pivot made elsewhere.
        save_every: steps between states, beside the end of every epoch; None: every five minutes.
        augment: what each image becomes before a step, a function of its own draws in that epoch; None: itself.
    """

    student: TrainedStudent
    teacher: Teacher | None
    images: Images
    stages: list[Stage]
    options: Optimization
    folder: Path
    measure: Callable[[], Accuracies] | None = None
    count: Callable[[], dict[str, HitCount]] | None = None
    progress: Progress = field(default_factory=Progress)
    tracking: Tracking | None = None
    pivot: Weights | None = None
    save_every: int | None = None
    augment: Callable[[Tensor, ImageRng], Tensor] | None = None

    def __post_init__(self) -> None:
        self.processes = self.student.processes
        self.accumulator = Accumulator(self.student, self.teacher, self.options)
        self.vanilla = copied(self.student.weights())
        self.state = TrainerState(best=copied(self.vanilla), pivot=self.pivot)
        self.optimizer = make_optimizer(self.student.parameters, self.options, self.student.rate_factors)
        self.log: Log | None = None
        self._saved_at = time.monotonic()

    def run(self) -> TrainerState:
        """Trains what is left to train; the returned state holds pivot, best weights and all epochs.

        Raises:
            UserError: a loss or gradient that is not finite; the last saved state is kept.
        """
        self.state.load(self.folder, self.student, self.optimizer)
        self.log = Log(self.folder, self.state.position.done) if self.processes.is_main else None
        for number in range(self.state.position.stage, len(self.stages)):
            self._run_stage(number)
        return self.state

    def _run_stage(self, number: int) -> None:
        """Runs the remaining epochs of a stage and saves the state at its end."""
        stage, per_epoch = self.stages[number], -(-len(self.images) // self.options.batch_size)
        begun = self.state.position.epoch * per_epoch + self.state.position.step
        self.progress.begin(stage.name, stage.epochs * per_epoch, begun)
        if not begun:
            self._begin_stage(stage)
        for epoch in range(self.state.position.epoch, stage.epochs):
            self._run_epoch(stage, epoch)
        if stage.ema is not None:
            self.state.pivot = self.state.ema
        self.state.position = TrainerPosition(number + 1, 0, 0, self.state.position.done)
        self._save()

    def _begin_stage(self, stage: Stage) -> None:
        """Prepares weights, optimizer and moving average at the first step of a stage."""
        if stage.restart:
            put_(self.student.weights(), self.vanilla)
        if stage.pull is not None and stage.pull < 1 and self.state.pivot is None:
            raise UserError(
                f"stage {stage.name} pulls towards a pivot and there is none; run stage a first or give --pivot."
            )
        self.optimizer = make_optimizer(self.student.parameters, self.options, self.student.rate_factors)
        self.state.ema = copied(self.student.weights()) if stage.ema is not None else None
        self.student.refresh()

    def _run_epoch(self, stage: Stage, epoch: int) -> None:
        """Runs the remaining steps of an epoch."""
        purpose, started, state = f"{stage.name}/{epoch}", time.monotonic(), self.state
        order = batches(self.images.order(self.options.seed, purpose), self.options.batch_size)
        steps = stage.epochs * len(order)
        if state.position.step == 0:
            state.sums = {}
            self.student.carried.clear()
            self._pull_to_pivot(stage, epoch)
        shares = [self.processes.share(index) for index in order[state.position.step :]]
        for batch in self.images.stream(shares):
            step = state.position.step
            self.student.iteration = epoch * len(order) + step
            warm_up = self.options.warm_up_of(steps)
            rate = stage.rate_at(self.student.iteration, steps, warm_up)
            values = self._step(stage, purpose, batch, rate)
            for name, value in values.items():
                state.sums[name] = state.sums.get(name, 0.0) + value * len(order[step])
            state.position = state.position._replace(step=step + 1, done=state.position.done + 1)
            self._log({"step": state.position.done, "stage": stage.name, "epoch": epoch + 1, "rate": rate, **values})
            if step + 1 < len(order) and self._save_is_due():
                self._save()
        self._end_epoch(stage, epoch, started)

    def _pull_to_pivot(self, stage: Stage, epoch: int) -> None:
        """Moves the weights towards the pivot, if the stage does so at this epoch."""
        if stage.pulls_at(epoch) and stage.pull is not None and self.state.pivot is not None:
            pull_(self.student.weights(), self.state.pivot, stage.pull)
            self.student.refresh()

    def _step(self, stage: Stage, purpose: str, batch: Batch, rate: float) -> dict[str, float]:
        """Takes one step on a batch and returns its mean losses, metrics and gradient norm."""
        device = self.processes.device
        batch = Batch(batch.ids, batch.images.to(device), batch.labels.to(device))
        halved = len(self.accumulator.halved)
        rng = ImageRng(self.options.seed, batch.ids, purpose)
        if self.augment is not None and batch.ids:
            batch = batch._replace(images=self.augment(batch.images, rng.child("augment")))
        means = self.accumulator.gradients(stage.objective, batch, rng)
        for size in self.accumulator.halved[halved:]:
            self.progress.note(f"out of memory: the micro-batch is halved to {size} images; the batch stays as it is")
        if not math.isfinite(means["loss"]):
            raise UserError(self._stop_message(stage, f"the loss is {means['loss']}"))
        norm = update(self.student, self.optimizer, rate, self.options.clip)
        self.student.refresh()
        if math.isfinite(norm):
            return {**means, "gradient_norm": norm}
        if self.processes.scaler.is_enabled():
            return means  # float16 overflowed: the step was left out and the loss scale lowered
        raise UserError(self._stop_message(stage, f"the norm of the gradient is {norm}"))

    def _stop_message(self, stage: Stage, reason: str) -> str:
        """Returns the message for a loss or gradient that is not finite."""
        position = self.state.position
        return (
            f"stage {stage.name}, epoch {position.epoch + 1}, step {position.done + 1}: {reason}; nothing of this step "
            f"was kept, the last good state is in {self.folder}. Give a smaller {stage.rate_option}, or --clip 1."
        )

    def _end_epoch(self, stage: Stage, epoch: int, started: float) -> None:
        """Measures, logs and saves at the end of an epoch; keeps the best weights."""
        state = self.state
        if stage.ema is not None and state.ema is not None:
            average_(state.ema, self.student.weights(), stage.ema)
        held_out = self.measure() if self.measure is not None else None
        probed = self.count() if self.count is not None else {}
        means = {name: value / len(self.images) for name, value in state.sums.items()}
        line: dict[str, Any] = {"step": state.position.done, "stage": stage.name, "epoch": epoch + 1, "mean": means}
        if held_out is not None:
            line |= {"clean": list(held_out.clean), "robust": list(held_out.robust)}
        line |= {name: list(counted) for name, counted in probed.items()}
        if held_out is None or _score(line) > max(map(_score, self._epoch_lines(stage)), default=(-1, -1)):
            state.best = copied(self.student.weights())
        state.epochs.append(line)
        if self.log is not None:
            self.log.write(line, flush=True)
        if self.tracking is not None:
            counts = {**({} if held_out is None else held_out._asdict()), **probed}
            shares = {name: counted.share for name, counted in counts.items()}
            self.tracking.log({"step": line["step"], "stage": stage.name, **shares})
        seconds = time.monotonic() - started
        self.progress.end(
            EpochResult(stage.name, epoch + 1, stage.epochs, means["loss"], means, held_out, seconds, probed)
        )
        state.position = state.position._replace(epoch=epoch + 1, step=0)
        self._save()

    def _epoch_lines(self, stage: Stage) -> list[dict[str, Any]]:
        """Returns the logged lines of a stage's finished epochs."""
        return [line for line in self.state.epochs if line["stage"] == stage.name]

    def _log(self, line: dict[str, Any]) -> None:
        """Sends the values of a step to progress, log and tracker."""
        self.progress.advance(line)
        if self.log is not None:
            self.log.write(line)
        if self.tracking is not None:
            self.tracking.log(line)

    def _save_is_due(self) -> bool:
        """Returns whether the state is to be saved after this step."""
        if self.save_every is not None:
            return self.state.position.done % self.save_every == 0
        # by the clock in one process only: several would not agree on the step
        return self.processes.count == 1 and time.monotonic() - self._saved_at > SECONDS_BETWEEN_STATES

    def _save(self) -> None:
        """Saves the state (main process only) and waits for all processes."""
        if self.processes.is_main:
            self.state.save(self.folder, self.student, self.optimizer)
        self._saved_at = time.monotonic()
        self.processes.wait()


def _score(line: dict[str, Any]) -> tuple[int, int]:
    """Returns the robust and the clean hits of an epoch, by which epochs are compared."""
    return line["robust"][0], line["clean"][0]
