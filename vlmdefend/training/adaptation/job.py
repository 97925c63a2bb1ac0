"""The job of `urda-train`: from settings to an adapted teacher (step 1) and a robust student (step 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vlmdefend.defenses.adaptation.base import Adaptation
from vlmdefend.errors import UserError
from vlmdefend.models.backbone_names import load_backbone
from vlmdefend.models.classifier.classifier import ClassifierModel, ImageClassifier
from vlmdefend.models.classifier.folder import is_classifier_folder, save_classifier
from vlmdefend.progress import Progress
from vlmdefend.training.adaptation.measure import TargetNumbers
from vlmdefend.training.adaptation.methods import adaptation_of, robustification_of
from vlmdefend.training.adaptation.sets import open_sets
from vlmdefend.training.adaptation.step import AdaptationStep, StepName
from vlmdefend.training.adaptation.student import copy_of
from vlmdefend.training.adaptation.summary import summary_of
from vlmdefend.training.adaptation.teacher import FrozenTeacher, as_teacher, load_teacher
from vlmdefend.training.job import JobResult, TrainingJob
from vlmdefend.training.loop.cost import StageCost
from vlmdefend.training.settings.adaptation_settings import UrdaSettings

TEACHER: StepName = "teacher"
STUDENT: StepName = "student"


@dataclass(frozen=True, kw_only=True)
class Adapted(JobResult):
    """The result of `urda-train`; accuracies are on held-out target images."""

    before: TargetNumbers | None  # of the teacher; None: the run has no teacher
    after: TargetNumbers | None  # of the student; None: step 2 was left out
    theory: dict[str, Any]  # the terms of the bound that can be estimated

    @property
    def written(self) -> bool:
        """Whether ``out`` holds a classifier."""
        return is_classifier_folder(self.out)

    def spec(self) -> dict[str, Any]:
        """Returns the numbers as JSON, as the folder's summary holds them."""
        numbers = {"before": self.before, "after": self.after}
        return {**{name: n.spec() for name, n in numbers.items() if n is not None}, "theory": self.theory}


class AdaptationJob(TrainingJob[UrdaSettings, Adapted]):
    """Trains by unsupervised robust domain adaptation: an adapted teacher (step 1), then a robust student (step 2)."""

    def check_inputs(self) -> None:
        """Creates both methods, and refuses BatchNorm in training mode if several processes share a batch."""
        self.method, self.robust = adaptation_of(self.settings), robustification_of(self.settings)
        if self.settings.batch_norm == "train" and self.processes.count > 1:
            raise UserError("--batch-norm train needs the whole batch in one process; give --batch-norm frozen.")

    def open(self) -> None:
        """Opens the image sets and loads a teacher that needs no training."""
        self.sets = open_sets(self.settings)
        self.class_names = self.sets.source.class_names
        self.given = self._given_teacher()
        if self.processes.count > 1:
            self._check_additive()

    @property
    def wants_teacher(self) -> bool:
        """Whether the run needs a teacher, trained in step 1 or given."""
        starts = self.settings.init == "teacher"
        return self.robust is None or self.robust.teacher != "none" or starts or self.settings.teacher is not None

    @property
    def trains_teacher(self) -> bool:
        """Whether the teacher is trained in step 1."""
        return self.wants_teacher and self.given is None

    def costs(self) -> list[StageCost]:
        """Estimates the largest number of forward and backward passes of each stage."""
        return [cost for step in self._steps() for cost in step.costs()]

    def train(self, progress: Progress, summary: dict[str, Any]) -> Adapted:
        """Runs both steps, or what an earlier run did not finish; measures and writes teacher and student."""
        reused = bool(summary.get("finished"))
        teacher = self._teacher(progress) if self.wants_teacher else None
        student = None if self.robust is None else self._student(self.robust, teacher, progress)
        if not reused:
            summary = summary_of(self.settings, self.sets, teacher, student, self.processes.device)
            if self.processes.is_main:
                self._write(student or _model_of(teacher), teacher, summary)
                self.folder.write_summary({**summary, "finished": True})
        read = {name: TargetNumbers.read(summary[name]) if name in summary else None for name in ("before", "after")}
        theory = summary.get("theory", {})
        return Adapted(out=self.folder.out, before=read["before"], after=read["after"], theory=theory, reused=reused)

    def _given_teacher(self) -> FrozenTeacher | None:
        """Loads a teacher that needs no training: ``--teacher``, or the backbone of a zero-shot method; else None."""
        name = self.settings.teacher or (None if self.method.trains else self.settings.backbone)
        if name is None or not (self.settings.teacher or self.wants_teacher):
            return None
        return load_teacher(name, self.class_names, self.sets.source.templates, self.processes.device)

    def _teacher(self, progress: Progress) -> FrozenTeacher:
        """Returns the given teacher, or trains and saves one (step 1)."""
        if self.given is not None:
            return self.given
        classifier = self.new_classifier(self.settings.bottleneck).to(self.processes.device)
        step = AdaptationStep(TEACHER, self.method.phases, self.settings, self.sets)
        step.train(classifier, None, self, progress)
        model = ClassifierModel(TEACHER, classifier, self.class_names)
        if self.processes.is_main:
            save_classifier(model, self.folder.out / TEACHER, self._metadata(self.method.name))
        return as_teacher(model, self.class_names, TEACHER)

    def _student(self, method: Adaptation, teacher: FrozenTeacher | None, progress: Progress) -> ClassifierModel:
        """Trains and returns the student (step 2); the teacher's weights do not change."""
        classifier = self._initial_student(teacher).to(self.processes.device)
        before = "" if teacher is None else teacher.weights_hash
        if teacher is not None and method.teacher != "none" and getattr(method, "augment", "off") == "off":
            teacher.cache_outputs(self.sets.reader(self.sets.target, classifier), self.processes.device)
        step = AdaptationStep(STUDENT, method.phases, self.settings, self.sets)
        step.train(classifier, teacher, self, progress)
        if teacher is not None and teacher.weights_hash != before:
            raise RuntimeError("step 2 changed the teacher")
        return ClassifierModel(STUDENT, classifier, self.class_names)

    def _initial_student(self, teacher: FrozenTeacher | None) -> ImageClassifier:
        """Returns the student before its first step: the teacher's copy, or a new classifier (``--init``)."""
        model = _model_of(teacher)
        if self.settings.init == "imagenet":
            of_clip = teacher is not None and model is None
            return self.new_classifier(self._student_bottleneck(teacher), of_clip=of_clip)
        if model is None:
            what = "there is no teacher" if teacher is None else f"{teacher.name} has no head"
            raise UserError(f"--init teacher: {what} for the student to start from; give --init imagenet.")
        classifier = copy_of(model.classifier)
        classifier.batch_norm = self.settings.batch_norm
        return classifier

    def _student_bottleneck(self, teacher: FrozenTeacher | None) -> int:
        """Returns the width of the student's bottleneck: of the teacher's features if step 2 compares features."""
        if teacher is None or not getattr(self.robust, "features", False):
            return self.settings.bottleneck
        one = self.sets.target.select([0])
        like = load_backbone(self.settings.backbone, pretrained=False)
        found = teacher(self.sets.batch(one, like, self.processes.device).images).features
        return self.settings.bottleneck if found is None else int(found.shape[1])

    def new_classifier(self, bottleneck: int, *, of_clip: bool = False) -> ImageClassifier:
        """Returns a classifier of the backbone (pretrained, or random with ``--random``) and random other layers."""
        settings = self.settings
        return ImageClassifier(
            load_backbone(settings.backbone, pretrained=settings.pretrained, seed=settings.seed),
            len(self.class_names),
            bottleneck=bottleneck,
            bottleneck_kind="linear" if of_clip else "tllib",
            head=settings.head,
            batch_norm=settings.batch_norm,
            seed=settings.seed,
        )

    def _write(self, model: ClassifierModel | None, teacher: FrozenTeacher | None, summary: dict[str, Any]) -> None:
        """Writes the student, or the teacher if step 2 is left out, as a classifier folder."""
        if model is None:
            return  # a CLIP as teacher and no step 2: there is no classifier with a head
        method = "none" if self.robust is None else self.robust.name
        facts = {**self._metadata(method), "teacher": None if teacher is None else teacher.name, **summary}
        facts["teacher_weights_hash"] = None if teacher is None else teacher.weights_hash
        save_classifier(model, self.folder.out, facts)

    def _metadata(self, method: str) -> dict[str, Any]:
        """Returns what a written classifier's folder records of the run."""
        return {
            "made_by": "vlmdefend urda-train",
            "method": method,
            "settings": self.settings.model_dump(mode="json"),
            "source_ids_hash": self.sets.source.ids_hash,
            "target_ids_hash": self.sets.target.ids_hash,
            "selected_by": self.settings.select,
        }

    def facts(self) -> dict[str, Any]:
        """Returns settings and hashes of the images and a given teacher."""
        return {
            **self.settings.decisive(),
            "source_images": self.sets.source.ids_hash,
            "target_images": self.sets.target.ids_hash,
            "test_images": self.sets.tested.ids_hash,
            "teacher_weights": None if self.given is None else self.given.weights_hash,
        }

    def _check_additive(self) -> None:
        """Refuses losses that several processes cannot compute as one process does."""
        if self.settings.reduction != "mean":
            raise UserError(f"--reduction {self.settings.reduction} sums over a batch that processes share; give mean.")
        for method in (method for step in self._steps() for method in step.phases if not method.additive):
            raise UserError(
                f"{method.name} compares the images of a batch with one another, and each process has a part of it; "
                "run it in one process."
            )

    def _steps(self) -> list[AdaptationStep]:
        """Returns the steps that train something."""
        found = [AdaptationStep(TEACHER, self.method.phases, self.settings, self.sets)] if self.trains_teacher else []
        return found + (
            [] if self.robust is None else [AdaptationStep(STUDENT, self.robust.phases, self.settings, self.sets)]
        )


def _model_of(teacher: FrozenTeacher | None) -> ClassifierModel | None:
    """Returns the teacher's model if it is a classifier with a head."""
    model = None if teacher is None else teacher.model
    return model if isinstance(model, ClassifierModel) else None
