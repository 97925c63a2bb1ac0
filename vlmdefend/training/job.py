"""The base of the training commands: a job goes from settings to files, and resumes where an earlier run stopped."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from vlmdefend.defenses.training_time.base import Teacher
from vlmdefend.progress import Progress
from vlmdefend.training.loop.data import Images
from vlmdefend.training.loop.folder import RunFolder
from vlmdefend.training.loop.log import Tracking, check_tracker
from vlmdefend.training.loop.processes import Processes, deterministic
from vlmdefend.training.loop.stage import Optimization, Stage
from vlmdefend.training.loop.student import TrainedStudent
from vlmdefend.training.loop.trainer import Trainer
from vlmdefend.training.loop.trainer_state import TrainerState
from vlmdefend.training.settings.run_settings import RunSettings


@dataclass(frozen=True, kw_only=True)
class JobResult:
    """The result of a training job."""

    out: Path  # the run folder
    reused: bool  # True: an earlier run had finished the job


Settings = TypeVar("Settings", bound=RunSettings)
Result = TypeVar("Result", bound=JobResult)


class TrainingJob(ABC, Generic[Settings, Result]):
    """One run of a training command; subclasses define what is opened, trained, measured and written.

    Construction checks the settings, the folder and the processes and opens models and images; training starts with
    :meth:`run`.

    Args:
        settings: every option of the run.

    Raises:
        UserError: settings that do not fit together, or models or images that cannot be opened.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        check_tracker(settings.track)
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.folder = RunFolder(settings.out)
        self.processes = Processes(settings.device, settings.precision)
        self.check_inputs()
        self.open()

    @abstractmethod
    def check_inputs(self) -> None:
        """Checks the settings against the method and the number of processes.

        Raises:
            UserError: a combination that cannot work; the message names the option to change.
        """

    @abstractmethod
    def open(self) -> None:
        """Loads models and opens images."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Returns the values that must not change when a run is resumed: settings, hashes of images and weights."""

    @abstractmethod
    def train(self, progress: Progress, summary: dict[str, Any]) -> Result:
        """Trains what an earlier run did not finish, measures, and writes models and summary.

        Args:
            progress: receives the events of the run.
            summary: the summary that an earlier run wrote; empty if there is none, and in all but the main process.
        """

    def run(self, progress: Progress) -> Result:
        """Runs or resumes the job and returns its result; a finished job is read from its folder.

        Raises:
            UserError: the folder holds a run with other settings, or a loss is not finite.
            Busy: another process has locked the folder.
        """
        main = self.processes.is_main
        with deterministic(), self.folder.writing() if main else nullcontext():
            if main:
                self.folder.check_settings(self.facts())
            self.processes.wait()
            return self.train(progress, self.folder.summary() if main else {})

    def fit(
        self,
        student: TrainedStudent,
        teacher: Teacher | None,
        images: Images,
        stages: list[Stage],
        optimization: Optimization,
        folder: Path,
        progress: Progress,
        **options: Any,
    ) -> TrainerState:
        """Runs the training loop and returns its final state; log, state file and tracker are written to ``folder``.

        Args:
            folder: created if it does not exist.
            options: further arguments of :class:`~vlmdefend.training.loop.trainer.Trainer`, as the others are.
        """
        if self.processes.is_main:
            folder.mkdir(parents=True, exist_ok=True)
        self.processes.wait()
        tracking = Tracking(self.settings.track, self.processes, folder, self.facts())
        trainer = Trainer(
            student,
            teacher,
            images,
            stages,
            optimization,
            folder,
            progress=progress,
            tracking=tracking,
            save_every=self.settings.save_every,
            **options,
        )
        self.processes.wait()
        state = trainer.run()
        tracking.close()
        return state
