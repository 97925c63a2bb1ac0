"""The state of the training loop between steps: position, averages, best weights; saved and loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vlmdefend.training.loop.state_file import load_state, optimizer_tensors, restore_optimizer, save_state
from vlmdefend.training.loop.student import TrainedStudent
from vlmdefend.training.loop.weight_averages import Weights, put_

STATE = "state.safetensors"


class TrainerPosition(NamedTuple):
    """The next step to take: of this stage and epoch (0, 1, ...); ``done`` counts steps over all stages."""

    stage: int = 0
    epoch: int = 0
    step: int = 0
    done: int = 0


@dataclass
class TrainerState:
    """Beside the weights themselves and the optimizer's own. Random numbers need no memory: they are functions of
    (seed, stage, epoch, image)."""

    best: Weights
    ema: Weights | None = None
    pivot: Weights | None = None
    position: TrainerPosition = field(default_factory=TrainerPosition)
    epochs: list[dict[str, Any]] = field(default_factory=list)  # a line of the log for each that is done
    sums: dict[str, float] = field(default_factory=dict)  # over the images of the epoch that runs

    def save(self, folder: Path, student: TrainedStudent, optimizer: torch.optim.Optimizer) -> None:
        """Writes all that is needed to resume, as one file."""
        groups = {
            "weights": student.weights(),
            "optimizer": optimizer_tensors(optimizer, list(student.parameters)),
            "best": self.best,
        }
        groups |= {"carried": student.carried} if student.carried else {}
        groups |= {} if self.ema is None else {"ema": self.ema}
        groups |= {} if self.pivot is None else {"pivot": self.pivot}
        facts = {"position": list(self.position), "epochs": self.epochs, "sums": self.sums}
        save_state(folder / STATE, groups, {**facts, "scaler": student.processes.scaler.state_dict()})

    def load(self, folder: Path, student: TrainedStudent, optimizer: torch.optim.Optimizer) -> bool:
        """Restores a saved state, weights and optimizer too; returns False if there is none."""
        if not (folder / STATE).exists():
            return False
        groups, facts = load_state(folder / STATE)
        device = student.processes.device
        placed = {group: {k: t.to(device) for k, t in named.items()} for group, named in groups.items()}
        put_(student.weights(), placed["weights"])
        restore_optimizer(optimizer, list(student.parameters), groups["optimizer"])
        self.best, self.ema, self.pivot = placed["best"], placed.get("ema"), placed.get("pivot", self.pivot)
        self.position, self.epochs, self.sums = TrainerPosition(*facts["position"]), facts["epochs"], facts["sums"]
        student.carried = placed.get("carried", {})
        if facts["scaler"]:
            student.processes.scaler.load_state_dict(facts["scaler"])
        student.refresh()
        return True
