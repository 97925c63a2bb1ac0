"""Robust adaptation from settings to a classifier: adapted teacher (step 1), robust student (step 2), numbers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from vlmdefend.data import load_dataset
from vlmdefend.data.base import ImageSet
from vlmdefend.data.transforms import PixelTransform
from vlmdefend.defenses.adaptation import ADAPTATIONS
from vlmdefend.defenses.adaptation.base import Adaptation
from vlmdefend.errors import UserError
from vlmdefend.models.backbones import Backbone, load_backbone
from vlmdefend.models.classifier import ClassifierModel, ImageClassifier
from vlmdefend.models.classifier_folder import is_classifier_folder, save_classifier
from vlmdefend.training.cost import StageCost, stage_cost
from vlmdefend.training.data import TrainingImages
from vlmdefend.training.folder import RunFolder
from vlmdefend.training.listener import Accuracies, Listener
from vlmdefend.training.log import Tracking, check_tracker
from vlmdefend.training.loop import Run
from vlmdefend.training.processes import Processes, deterministic
from vlmdefend.training.schedule import Decay
from vlmdefend.training.stage import Optimization, Stage
from vlmdefend.training.urda_data import DomainImages, same_classes, unlabelled
from vlmdefend.training.urda_judge import judge_of
from vlmdefend.training.urda_measure import (
    DomainDistance,
    TargetNumbers,
    accuracy,
    domain_distance,
    features_at,
    target_numbers,
)
from vlmdefend.training.urda_settings import UrdaSettings
from vlmdefend.training.urda_student import AdaptedStudent, copy_of
from vlmdefend.training.urda_teacher import FrozenTeacher, TeacherPipeline, as_teacher, load_teacher, predictions
from vlmdefend.training.weights import put_
from vlmdefend.types import Batch

TEACHER, STUDENT = "teacher", "student"
ABLATED = {"features": "features", "defense": "defense", "prediction": "prediction", "entropy-weight": "entropy_weight"}


@dataclass(frozen=True)
class Adapted:
    """What a run made. Accuracies are on held-out target images."""

    out: Path
    before: TargetNumbers | None  # of the teacher; None: there was none
    after: TargetNumbers | None  # of the student; None: step 2 was left out
    theory: dict[str, Any]  # the terms of the bound that can be estimated
    reused: bool  # nothing was left to do

    @property
    def written(self) -> bool:
        """Whether there is a classifier in ``out``."""
        return is_classifier_folder(self.out)

    def spec(self) -> dict[str, Any]:
        """As JSON, as it is kept in the folder."""
        numbers = {"before": self.before, "after": self.after}
        return {**{name: n.spec() for name, n in numbers.items() if n is not None}, "theory": self.theory}


@dataclass
class RobustAdaptation:
    """A run, made ready: sets opened, methods named, folder checked.

    Args:
        settings: every choice.

    Raises:
        UserError: what is missing or does not fit; nothing was trained.
    """

    settings: UrdaSettings
    method: Adaptation = field(init=False)
    robust: Adaptation | None = field(init=False)

    def __post_init__(self) -> None:
        settings = self.settings
        check_tracker(settings.track)
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.method = _create(settings.method, "adaptation")
        self.robust = None if settings.robustify == "none" else _robust(settings)
        self.folder = RunFolder(settings.out)
        self.processes = Processes(settings.device, settings.precision)
        if settings.batch_norm == "train" and self.processes.count > 1:
            raise UserError("--batch-norm train needs the whole batch in one process; give --batch-norm frozen.")
        if self.processes.count > 1 and settings.reduction != "mean":
            raise UserError(f"--reduction {settings.reduction} sums over a batch that processes share; give mean.")
        self._open_sets()

    def _open_sets(self) -> None:
        """Labelled source; target without labels to train on and choose by; labelled images to measure on."""
        settings = self.settings
        self.source = load_dataset(settings.source, "train", limit=settings.limit, root=settings.root)
        target = load_dataset(settings.target, "train", root=settings.root)
        target = same_classes(self.source, target)
        blind = unlabelled(target).subset(settings.limit, settings.seed)
        held = blind.subset(settings.held_out, settings.seed + 1) if settings.held_out else blind.select([])
        if settings.held_out >= len(blind):
            raise UserError(f"--held-out {settings.held_out}: the target has {len(blind)} training images.")
        apart = frozenset(held.ids)
        self.target = blind.select([i for i, name in enumerate(blind.ids) if name not in apart])
        self.held_out = held
        if (
            settings.select == "oracle"
        ):  # the one place where labels of training images are read, because it was asked for
            place = {name: i for i, name in enumerate(target.ids)}
            self.held_out = target.select([place[name] for name in held.ids])
        self.tested = same_classes(self.source, self._evaluation_set(settings.target))
        self.source_tested = self._evaluation_set(settings.source)

    def _evaluation_set(self, name: str) -> ImageSet:
        settings = self.settings
        return load_dataset(name, settings.eval_split, limit=settings.eval_limit, root=settings.root)

    @property
    def wants_teacher(self) -> bool:
        """Whether there is a step 1 (or a given teacher)."""
        starts = self.settings.init == "teacher"
        return self.robust is None or self.robust.teacher != "none" or starts or self.settings.teacher is not None

    @property
    def trains_teacher(self) -> bool:
        """Whether step 1 has anything to train."""
        return self.wants_teacher and self.settings.teacher is None and self.method.trains

    def costs(self) -> list[StageCost]:
        """What each stage will cost at most."""
        settings, found = self.settings, []
        steps: list[tuple[tuple[Adaptation, ...], str, int | None, int]] = []
        if self.trains_teacher:
            steps.append((self.method.phases, TEACHER, settings.iterations_teacher, settings.batch_size))
        if self.robust is not None:
            steps.append((self.robust.phases, STUDENT, settings.iterations_student, settings.batch_size_student))
        for phases, step, iterations, size in steps:
            for method in phases:
                epochs = settings.epochs_teacher if step == TEACHER else settings.epochs_student
                longest = self._epoch(method, size, iterations)
                stage = Stage(name=_stage_name(step, method, phases), objective=method, epochs=epochs, rate=0.0)
                found.append(stage_cost(stage, Optimization(batch_size=size), longest))
        return found

    def run(self, listener: Listener) -> Adapted:
        """Both steps, or what is left of them; write teacher and student. ``listener`` hears of it."""
        with deterministic(), self.folder.writing() if self.processes.is_main else nullcontext():
            if self.processes.is_main:
                self.folder.check_settings(self._facts())
            self.processes.wait()
            return self._run(listener)

    def _run(self, listener: Listener) -> Adapted:
        summary = self.folder.summary() if self.processes.is_main else {}
        reused = bool(summary.get("finished"))
        teacher = self._teacher(listener) if self.wants_teacher else None
        student = None if self.robust is None else self._student(self.robust, teacher, listener)
        if not reused:
            summary = self._measured(teacher, student)
            if self.processes.is_main:
                self._write(student or _model_of(teacher), teacher, summary)
                self.folder.write_summary({**summary, "finished": True})
        read = {name: TargetNumbers.read(summary[name]) if name in summary else None for name in ("before", "after")}
        return Adapted(self.folder.out, read["before"], read["after"], summary.get("theory", {}), reused)

    def _teacher(self, listener: Listener) -> FrozenTeacher:
        """Step 1: adapt, or load."""
        settings, names = self.settings, self.source.class_names
        if settings.teacher is not None:
            return load_teacher(settings.teacher, names, self.source.templates, self.processes.device)
        if not self.method.trains:
            return load_teacher(settings.backbone, names, self.source.templates, self.processes.device)
        classifier = self._fresh(settings.bottleneck).to(self.processes.device)
        self._train(TEACHER, classifier, self.method.phases, None, listener)
        model = ClassifierModel(TEACHER, classifier, names)
        if self.processes.is_main:
            save_classifier(model, self.folder.out / TEACHER, self._metadata(self.method.name))
        return as_teacher(model, names, TEACHER)

    def _student(self, method: Adaptation, teacher: FrozenTeacher | None, listener: Listener) -> ClassifierModel:
        """Step 2: the teacher stays as it is, to the bit."""
        given = None if teacher is None else teacher.model
        if self.settings.init == "teacher":
            if not isinstance(given, ClassifierModel):
                raise UserError(
                    f"--init teacher: {'there is no teacher' if teacher is None else teacher.name} to begin from as a "
                    "classifier with a head; give --init imagenet."
                )
            classifier = copy_of(given.classifier)
            classifier.batch_norm = self.settings.batch_norm
        else:
            classifier = self._fresh(self._width_for(teacher), of_clip=not isinstance(given, ClassifierModel | None))
        classifier = classifier.to(self.processes.device)
        before = "" if teacher is None else teacher.weights_hash
        if teacher is not None and method.teacher != "none" and getattr(method, "augment", "off") == "off":
            teacher.look_at(self._reader(self.target, classifier), self.processes.device)
        self._train(STUDENT, classifier, method.phases, teacher, listener)
        if teacher is not None and teacher.weights_hash != before:
            raise RuntimeError("step 2 changed the teacher")
        return ClassifierModel(STUDENT, classifier, self.source.class_names)

    def _width_for(self, teacher: FrozenTeacher | None) -> int:
        """The student's bottleneck: as wide as the teacher's features, where they are to be equal."""
        if teacher is None or not getattr(self.robust, "features", False):
            return self.settings.bottleneck
        reader = TrainingImages(self.target.select([0]), self._transform(load_backbone(self.settings.backbone)))
        found = teacher(reader.batch([0]).images.to(self.processes.device)).features
        return self.settings.bottleneck if found is None else int(found.shape[1])

    def _fresh(self, bottleneck: int, *, of_clip: bool = False) -> ImageClassifier:
        """Backbone with its own weights, the rest random."""
        settings = self.settings
        backbone = load_backbone(settings.backbone, pretrained=settings.pretrained, seed=settings.seed)
        return ImageClassifier(
            backbone,
            len(self.source.class_names),
            bottleneck=bottleneck,
            bottleneck_kind="linear" if of_clip else "tllib",
            head=settings.head,
            batch_norm=settings.batch_norm,
            seed=settings.seed,
        )

    def _train(
        self,
        step: str,
        classifier: ImageClassifier,
        phases: tuple[Adaptation, ...],
        teacher: FrozenTeacher | None,
        listener: Listener,
    ) -> None:
        """All stages of a step, each in a folder of its own; ``classifier`` ends with the chosen weights."""
        settings, first = self.settings, step == TEACHER
        factor = settings.backbone_factor
        if factor is None:
            factor = 0.1 if classifier.pretrained and (first or settings.init == "imagenet") else 1.0
        size = settings.batch_size if first else settings.batch_size_student
        for method in phases:
            name = _stage_name(step, method, phases)
            student = AdaptedStudent(classifier, (method,), self.processes, backbone_factor=factor, seed=settings.seed)
            folder = self.folder.training / name
            if self.processes.is_main:
                folder.mkdir(parents=True, exist_ok=True)
            self.processes.wait()
            stage = Stage(
                name=name,
                objective=method,
                epochs=settings.epochs_teacher if first else settings.epochs_student,
                rate=settings.lr_teacher if first else settings.lr_student,
                decay=Decay(),
            )
            tracking = Tracking(settings.track, self.processes, folder, self._facts())
            run = Run(
                student,
                teacher if method.teacher != "none" else None,
                self._images(
                    method, classifier, size, settings.iterations_teacher if first else settings.iterations_student
                ),
                [stage],
                Optimization(
                    momentum=settings.momentum,
                    nesterov=settings.momentum > 0,
                    weight_decay=settings.weight_decay,
                    batch_size=size,
                    seed=settings.seed,
                ),
                folder,
                judge=self._judge(classifier, teacher, first=first),
                listener=listener,
                tracking=tracking,
                save_every=settings.save_every,
            )
            memory = run.run()
            tracking.close()
            if settings.select != "last":
                put_(student.weights(), memory.best)
        classifier.requires_grad_(False)

    def _images(
        self, method: Adaptation, classifier: ImageClassifier, size: int, iterations: int | None
    ) -> DomainImages:
        source = self._reader(self.source, classifier) if method.domains != "target" else None
        target = self._reader(self.target, classifier) if method.domains != "source" else None
        return DomainImages(source, target, self._epoch(method, size, iterations))

    def _epoch(self, method: Adaptation, size: int, iterations: int | None) -> int:
        """Images of each domain in an epoch: whole batches of the larger set, unless steps were asked for.

        A last batch of one or two images would have no statistics for BatchNorm; the order decides who is left out.
        """
        sets = {"both": (self.source, self.target), "source": (self.source,), "target": (self.target,)}
        longest = max(len(images) for images in sets[method.domains])
        return size * (iterations or max(1, longest // size))

    def _judge(
        self, classifier: ImageClassifier, teacher: FrozenTeacher | None, *, first: bool
    ) -> Callable[[], Accuracies] | None:
        if self.settings.select == "last" or (first and self.settings.select == "agreement"):
            return None
        batch = self._batch(self.held_out, classifier)
        eps = 0.0 if first else self.settings.radius
        return judge_of(self.settings.select, classifier, teacher, batch, eps, self.settings.seed, self.processes)

    def _measured(self, teacher: FrozenTeacher | None, student: ClassifierModel | None) -> dict[str, Any]:
        """The three numbers of both models, and the terms of the bound."""
        settings, classes = self.settings, len(self.source.class_names)
        like = student.classifier if student is not None else None
        batch = self._batch(self.tested, like)
        if teacher is not None:
            pseudo = predictions(teacher, batch)
        else:
            assert student is not None
            pseudo = predictions(as_teacher(student, self.source.class_names), batch)
        measured: dict[str, Any] = {"pseudo_labels_of": STUDENT if teacher is None else teacher.name}
        numbers: dict[str, TargetNumbers] = {}
        if teacher is not None:
            pipeline = TeacherPipeline(teacher, classes)
            numbers["before"] = target_numbers(pipeline, batch, pseudo, settings.radius, settings.seed)
        if student is not None:
            pipeline_of_student = student.zero_shot(self.source.class_names, ())
            numbers["after"] = target_numbers(pipeline_of_student, batch, pseudo, settings.radius, settings.seed)
        measured |= {name: found.spec() for name, found in numbers.items()}
        measured["theory"] = self._theory(teacher, batch, like, numbers)
        return measured

    def _theory(
        self,
        teacher: FrozenTeacher | None,
        target: Batch,
        like: ImageClassifier | None,
        numbers: dict[str, TargetNumbers],
    ) -> dict[str, Any]:
        """R_T^adv(h) <= R_S(g) + d/2 + lambda* + A_T(h, g), term by term; lambda* needs labels of both domains."""
        if teacher is None:
            return {}
        source = self._batch(self.source_tested, like)
        distance: DomainDistance = domain_distance(
            features_at(teacher, source), features_at(teacher, target), self.settings.seed
        )
        found: dict[str, Any] = {
            "source_accuracy": list(accuracy(teacher, source)),
            "target_accuracy": list(accuracy(teacher, target)),
            "domain_errors": list(distance),
        }
        last = numbers.get("after", numbers.get("before"))
        if last is not None:
            found["disagreement"] = list(last.disagreement)
        return found

    def _write(self, model: ClassifierModel | None, teacher: FrozenTeacher | None, summary: dict[str, Any]) -> None:
        if model is None:
            return  # a CLIP as teacher and no step 2: there is no classifier with a head
        made = "none" if self.robust is None else self.robust.name
        facts = {**self._metadata(made), "teacher": None if teacher is None else teacher.name, **summary}
        facts["teacher_weights_hash"] = None if teacher is None else teacher.weights_hash
        save_classifier(model, self.folder.out, facts)

    def _metadata(self, method: str) -> dict[str, Any]:
        return {
            "made_by": "vlmdefend urda-train",
            "method": method,
            "settings": self.settings.model_dump(mode="json"),
            "source_ids_hash": self.source.ids_hash,
            "target_ids_hash": self.target.ids_hash,
            "selected_by": self.settings.select,
        }

    def _facts(self) -> dict[str, Any]:
        """What must not change between the beginning of a run and its end."""
        return {
            **self.settings.decisive(),
            "source_images": self.source.ids_hash,
            "target_images": self.target.ids_hash,
            "test_images": self.tested.ids_hash,
        }

    def _transform(self, like: ImageClassifier | Backbone) -> PixelTransform:
        return PixelTransform(like.image_size, like.interpolation)

    def _reader(self, images: ImageSet, like: ImageClassifier) -> TrainingImages:
        return TrainingImages(images, self._transform(like), skip_bad=self.settings.skip_bad)

    def _batch(self, images: ImageSet, like: ImageClassifier | None) -> Batch:
        """A whole set on the device, at the size that the models take."""
        shape = like if like is not None else load_backbone(self.settings.backbone, pretrained=False)
        reader = TrainingImages(images, self._transform(shape), skip_bad=self.settings.skip_bad)
        found = reader.batch(range(len(images)))
        return Batch(found.ids, found.images.to(self.processes.device), found.labels.to(self.processes.device))


def _stage_name(step: str, method: Adaptation, phases: tuple[Adaptation, ...]) -> str:
    return step if method is phases[-1] else f"{step}-{method.name}"


def _model_of(teacher: FrozenTeacher | None) -> ClassifierModel | None:
    model = None if teacher is None else teacher.model
    return model if isinstance(model, ClassifierModel) else None


def _create(text: str, role: str, **options: Any) -> Adaptation:
    method: Adaptation = ADAPTATIONS.create(text, **options)
    if method.role != role:
        option = "--robustify" if method.role == "robustification" else "--method"
        raise UserError(f"{method.name} is a method of {method.role}; give it as {option} {text}.")
    return method


def _robust(settings: UrdaSettings) -> Adaptation:
    """Step 2's objective: what its text says, and what the flags say of the options that it has."""
    from vlmdefend.registry import parse_spec

    cls = ADAPTATIONS.get(parse_spec(settings.robustify)[0])
    has = {f.name for f in fields(cls)} - set(parse_spec(settings.robustify)[1])  # type: ignore[arg-type]
    flags: dict[str, Any] = {
        "eps": settings.radius,
        "alpha": settings.step_size,
        "steps": settings.steps,
    }
    if cls.name == "dart-urda":
        flags |= {"weight_reduction": settings.reduction, "trade_off": settings.trade_off, "space": settings.space}
        flags |= {"augment": settings.augment, **{ABLATED[term]: False for term in settings.ablate}}
    elif settings.ablate:
        raise UserError(f"--ablate: {cls.name} has no such terms; it is for dart-urda.")
    return _create(settings.robustify, "robustification", **{k: v for k, v in flags.items() if k in has})
