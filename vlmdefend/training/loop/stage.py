"""A stage of a run: one objective, one schedule, and what happens to the weights between epochs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vlmdefend.defenses.training_time.base import Objective
from vlmdefend.training.loop.schedule import Decay, learning_rate, warm_up_steps

Optimizer = Literal["sgd", "adamw"]
ONLY = "train"  # the name of the stage of a run that has one


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Objective, epochs, rate and averaging of one stage.

    Args:
        name: ``a``, ``b``: part of the purpose of every random draw, so that stages are independent.
        objective: what is minimised.
        epochs: passes over the training images.
        rate: base learning rate.
        restart: begin from the vanilla weights rather than from where the stage before ended.
        ema: decay of the average that is updated at the end of every epoch and starts at the vanilla weights; the
            average is what this stage hands on as pivot. None: no average.
        pull: share of the own weights that is kept when an epoch begins with a pull to the pivot. None: no pull.
        pull_first: also before the first epoch.
        decay: of the rate, in place of warm-up and cosine.
    """

    name: str
    objective: Objective
    epochs: int
    rate: float
    restart: bool = True
    ema: float | None = None
    pull: float | None = None
    pull_first: bool = False
    decay: Decay | None = None

    @property
    def rate_option(self) -> str:
        """The option that sets the rate, for messages: ``--lr-a``; ``--lr`` where there is one stage only."""
        return "--lr" if self.name == ONLY else f"--lr-{self.name}"

    def pulls_at(self, epoch: int) -> bool:
        """Returns whether epoch (0, 1, ...) begins with a pull towards the pivot."""
        return self.pull is not None and (epoch > 0 or self.pull_first)

    def rate_at(self, step: int, steps: int, warm_up: int) -> float:
        """Returns the learning rate of ``step`` (0, 1, ... ``steps`` - 1) of this stage."""
        if self.decay is not None:
            return self.rate * self.decay.factor(step)
        return learning_rate(step, steps, self.rate, warm_up)


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """Optimizer, warm-up, clipping and batch size, the same in all stages.

    Args:
        optimizer: ``sgd`` (with momentum, as published) or ``adamw``.
        momentum: of SGD.
        nesterov: SGD looks ahead along its momentum.
        weight_decay: of either.
        warm_up: steps of linear warm-up; None: 1,000, but at most a tenth of the stage.
        clip: longest norm of the whole gradient; None: as it is.
        batch_size: images of a step, over all processes.
        batch_option: what sets it, for messages.
        micro_batch: images at once in one process; None: the whole share.
        seed: of the order of images and of every draw.
    """

    optimizer: Optimizer = "sgd"
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    warm_up: int | None = None
    clip: float | None = None
    batch_size: int = 64
    batch_option: str = "--batch-size"
    micro_batch: int | None = None
    seed: int = 0

    def warm_up_of(self, steps: int) -> int:
        """Returns the steps of warm-up in a stage of so many steps."""
        return warm_up_steps(steps) if self.warm_up is None else self.warm_up
