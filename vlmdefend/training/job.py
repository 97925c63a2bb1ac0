"""The base of the three training commands: one run from settings to files, resumed where an earlier run stopped."""

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
    """What every run returns."""

    out: Path
    reused: bool  # True: an earlier run had finished it


Settings = TypeVar("Settings", bound=RunSettings)
Result = TypeVar("Result", bound=JobResult)


class TrainingJob(ABC, Generic[Settings, Result]):
    """One run of a training command. A subclass says what is opened, trained, measured and written.

    Construction checks the settings, the folder and the processes and opens models and images; nothing is trained
    before :meth:`run`.

    Args:
        settings: every option of the run.

    Raises:
        UserError: something is missing or does not fit.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        check_tracker(settings.track)
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.folder = RunFolder(settings.out)
        self.processes = Processes(settings.device, settings.precision)
        self.refuse()
        self.open()

    @abstractmethod
    def refuse(self) -> None:
        """Refuses combinations of settings, method and number of processes that cannot work.

        Raises:
            UserError: names the option to change.
        """

    @abstractmethod
    def open(self) -> None:
        """Loads models and opens images."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Returns what must be the same for a run to be resumed: settings, and hashes of images and weights."""

    @abstractmethod
    def train(self, progress: Progress, summary: dict[str, Any]) -> Result:
        """Trains what is left to train, measures, writes models and summary.

        Args:
            progress: receives the events of the run.
            summary: what an earlier run measured; empty at first, and in processes other than the main one.
        """

    def run(self, progress: Progress) -> Result:
        """Trains, resumes, or finds the run finished; holds the folder's lock meanwhile.

        Raises:
            UserError: other settings than those that the folder's run was begun with; a loss that is not finite.
            Busy: another process trains into the folder.
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
        """Runs the training loop with its log, state and tracker in ``folder``, which is created if needed.

        Args:
            options: further arguments of :class:`~vlmdefend.training.loop.trainer.Trainer`.
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
