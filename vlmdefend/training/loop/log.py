"""The log of a training run: one JSON object per line, and any tracker that accelerate supports."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any, Literal

from vlmdefend.errors import UserError
from vlmdefend.training.loop.processes import Processes
from vlmdefend.training.loop.state_file import write_whole

Tracker = Literal["tensorboard", "trackio", "wandb"]
TRACKERS: tuple[Tracker, ...] = ("tensorboard", "trackio", "wandb")


class Log:
    """``log.jsonl``: a line per step and per epoch. Every line has ``step``, the steps done over all stages.

    Args:
        folder: where it lies.
        done: steps that the saved state has; lines beyond, of steps that will be computed again, are dropped.
    """

    def __init__(self, folder: Path, done: int) -> None:
        self.file = folder / "log.jsonl"
        if self.file.exists():
            kept = [line for line in self.file.read_bytes().splitlines(keepends=True) if _step_of(line) <= done]
            write_whole(self.file, b"".join(kept))

    def write(self, values: dict[str, Any], *, flush: bool = False) -> None:
        """Appends a line; ``flush`` forces it onto the disk, before a state that relies on it is saved."""
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(values) + "\n")
            if flush:
                stream.flush()
                os.fsync(stream.fileno())

    def read(self) -> list[dict[str, Any]]:
        """Returns all lines."""
        if not self.file.exists():
            return []
        return [json.loads(line) for line in self.file.read_bytes().splitlines()]


class Tracking:
    """Sends numbers to TensorBoard, trackio or Weights & Biases through accelerate; nothing for None."""

    def __init__(self, tracker: Tracker | None, processes: Processes, folder: Path, settings: dict[str, Any]) -> None:
        self.accelerator = processes.accelerator if tracker and processes.is_main else None
        if self.accelerator is not None:
            from accelerate.tracking import filter_trackers

            accelerator = self.accelerator
            accelerator.log_with = filter_trackers([str(tracker)], folder)
            accelerator.project_configuration.set_directories(str(folder))
            flat = {k: v if isinstance(v, int | float | bool) else str(v) for k, v in settings.items()}
            accelerator.init_trackers("vlmdefend", config=flat)

    def log(self, values: dict[str, Any]) -> None:
        """Sends the numbers of one line of the log."""
        if self.accelerator is not None:
            numbers = {k: v for k, v in values.items() if isinstance(v, int | float) and k != "step"}
            self.accelerator.log({f"{values['stage']}/{k}": v for k, v in numbers.items()}, step=values["step"])

    def close(self) -> None:
        """Ends the tracker."""
        if self.accelerator is not None:
            self.accelerator.end_training()


def check_tracker(tracker: Tracker | None) -> None:
    """Refuses a tracker whose package is not installed.

    Raises:
        UserError: with the line that installs it.
    """
    names = (tracker, "tensorboardX") if tracker == "tensorboard" else (tracker,)
    if tracker and not any(importlib.util.find_spec(name) for name in names if name):
        raise UserError(f"--track {tracker}: the package is not installed; `pip install {tracker}`, or leave it out.")


def _step_of(line: bytes) -> float:
    """Returns the step of a line; infinity if a kill cut the line."""
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else float("inf")
    except (ValueError, KeyError, TypeError):
        return float("inf")
