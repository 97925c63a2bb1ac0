"""One of the two steps of `urda-train`: trains a classifier through the stages of a method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from vlmdefend.defenses.adaptation.base import Adaptation
from vlmdefend.models.classifier.classifier import ImageClassifier
from vlmdefend.progress import Progress
from vlmdefend.training.adaptation.data import DomainImages
from vlmdefend.training.adaptation.selection import selection_score
from vlmdefend.training.adaptation.sets import AdaptationSets
from vlmdefend.training.adaptation.student import AdaptedStudent
from vlmdefend.training.adaptation.teacher import FrozenTeacher
from vlmdefend.training.job import TrainingJob
from vlmdefend.training.loop.cost import StageCost, stage_cost
from vlmdefend.training.loop.processes import Processes
from vlmdefend.training.loop.results import Accuracies
from vlmdefend.training.loop.schedule import Decay
from vlmdefend.training.loop.stage import Optimization, Stage
from vlmdefend.training.loop.weight_averages import put_
from vlmdefend.training.settings.adaptation_settings import UrdaSettings

StepName = Literal["teacher", "student"]


class StepStage(Stage):
    """A stage of a step; one option sets the rate of all its stages."""

    @property
    def rate_option(self) -> str:
        """The option that sets the rate, for messages."""
        return f"--lr-{self.name.partition('-')[0]}"


@dataclass(frozen=True)
class AdaptationStep:
    """Trains the ``teacher`` (step 1) or the ``student`` (step 2).

    Args:
        name: which of them.
        phases: objectives, each from where the one before ended.
        settings: of the run.
        sets: of the run.
    """

    name: StepName
    phases: tuple[Adaptation, ...]
    settings: UrdaSettings
    sets: AdaptationSets

    @property
    def size(self) -> int:
        """Images of each domain in a batch."""
        return self.settings.batch_size if self.name == "teacher" else self.settings.batch_size_student

    def costs(self) -> list[StageCost]:
        """Returns the most that each stage will cost."""
        options = Optimization(batch_size=self.size)
        return [stage_cost(self._stage(method), options, self._epoch(method)) for method in self.phases]

    def train(
        self,
        classifier: ImageClassifier,
        teacher: FrozenTeacher | None,
        job: TrainingJob[UrdaSettings, Any],
        progress: Progress,
    ) -> None:
        """Runs all stages, each with a log and a state of its own; ``classifier`` ends with the chosen weights."""
        for method in self.phases:
            stage = self._stage(method)
            student = AdaptedStudent(
                classifier,
                (method,),
                job.processes,
                backbone_factor=self._factor(classifier),
                steps=stage.epochs * -(-self._epoch(method) // self.size),
                seed=self.settings.seed,
            )
            state = job.fit(
                student,
                teacher if method.teacher != "none" else None,
                self._images(method, classifier),
                [stage],
                self._optimization(),
                job.folder.training / stage.name,
                progress,
                measure=self._score(classifier, teacher, job.processes),
            )
            if self.settings.select != "last":
                put_(student.weights(), state.best)
        classifier.requires_grad_(False)

    def _stage(self, method: Adaptation) -> Stage:
        settings, first = self.settings, self.name == "teacher"
        return StepStage(
            name=self.name if method is self.phases[-1] else f"{self.name}-{method.name}",
            objective=method,
            epochs=settings.epochs_teacher if first else settings.epochs_student,
            rate=settings.lr_teacher if first else settings.lr_student,
            decay=Decay(),
        )

    def _optimization(self) -> Optimization:
        settings = self.settings
        return Optimization(
            momentum=settings.momentum,
            nesterov=settings.momentum > 0,
            weight_decay=settings.weight_decay,
            clip=settings.clip,
            batch_size=self.size,
            batch_option="--batch-size" if self.name == "teacher" else "--batch-size-student",
            seed=settings.seed,
        )

    def _factor(self, classifier: ImageClassifier) -> float:
        """Returns the backbone's factor of the rate: a tenth where its weights are published and the rest is random."""
        if self.settings.backbone_factor is not None:
            return self.settings.backbone_factor
        begins = self.name == "teacher" or self.settings.init == "imagenet"
        return 0.1 if classifier.pretrained and begins else 1.0

    def _images(self, method: Adaptation, classifier: ImageClassifier) -> DomainImages:
        sets = self.sets
        source = sets.reader(sets.source, classifier) if method.domains != "target" else None
        target = sets.reader(sets.target, classifier) if method.domains != "source" else None
        return DomainImages(source, target, self._epoch(method))

    def _epoch(self, method: Adaptation) -> int:
        """Returns the images of each domain in an epoch: whole batches of the larger set, or the given steps.

        A last batch of one or two images would have no statistics for BatchNorm; the order decides who is left out.
        """
        both = {"source": self.sets.source, "target": self.sets.target}
        longest = max(len(images) for name, images in both.items() if method.domains in ("both", name))
        first = self.name == "teacher"
        iterations = self.settings.iterations_teacher if first else self.settings.iterations_student
        return self.size * (iterations or max(1, longest // self.size))

    def _score(
        self, classifier: ImageClassifier, teacher: FrozenTeacher | None, processes: Processes
    ) -> Callable[[], Accuracies] | None:
        select, first = self.settings.select, self.name == "teacher"
        if select == "last" or (first and select == "agreement"):
            return None
        batch = self.sets.batch(self.sets.held_out, classifier, processes.device)
        eps = 0.0 if first else self.settings.radius
        return selection_score(select, classifier, teacher, batch, eps, self.settings.seed)
