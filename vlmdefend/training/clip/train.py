"""A training-time defense from settings to a model folder: the model, the images, one stage, the result."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vlmdefend.data import load_dataset
from vlmdefend.data.transforms import PixelTransform
from vlmdefend.errors import UserError
from vlmdefend.models import load_model
from vlmdefend.models.clip.vision_language import VisionLanguageModel
from vlmdefend.progress import Progress
from vlmdefend.training.clip.adapters import choose_adapters
from vlmdefend.training.clip.augment import AUGMENTATIONS
from vlmdefend.training.clip.classifier import BatchNormPolicy, TrainedClassifier, choose_trained
from vlmdefend.training.clip.held_out import accuracies
from vlmdefend.training.clip.outcome import Outcome
from vlmdefend.training.clip.prompts import choose_prompts
from vlmdefend.training.clip.stored_features import Stores, store_features
from vlmdefend.training.clip.train_settings import TrainSettings
from vlmdefend.training.loop.cost import MemoryCost, StageCost, memory_cost, stage_cost
from vlmdefend.training.loop.data import Images, TrainingImages, hold_out
from vlmdefend.training.loop.folder import RunFolder
from vlmdefend.training.loop.log import Tracking, check_tracker
from vlmdefend.training.loop.processes import Processes, deterministic
from vlmdefend.training.loop.results import Accuracies
from vlmdefend.training.loop.student import AutocastTeacher, TrainedStudent
from vlmdefend.training.loop.trainer import Run
from vlmdefend.training.loop.weight_averages import put_
from vlmdefend.training.settings.run_settings import lines_of
from vlmdefend.types import Batch, Pipeline


@dataclass(frozen=True)
class Trained:
    """What a run made."""

    out: Path
    summary: dict[str, Accuracies]  # "vanilla", "result", "mix-0.5" ... on the held-out images; empty if there are none
    reused: bool  # nothing was left to do


@dataclass
class Training:
    """A run, made ready: model loaded, images opened, folder checked.

    Args:
        settings: every choice.

    Raises:
        UserError: what is missing or does not fit; nothing was trained.
    """

    settings: TrainSettings

    def __post_init__(self) -> None:
        settings = self.settings
        check_tracker(settings.track)
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.folder = RunFolder(settings.out)
        self.processes = Processes(settings.device, settings.precision)
        if settings.batch_norm == "train" and (self.processes.count > 1 or settings.micro_batch):
            raise UserError(
                "--batch-norm train needs the whole batch in one forward: run one process without --micro-batch, or "
                "give --batch-norm frozen."
            )
        if settings.objective.whole_batch and (self.processes.count > 1 or settings.micro_batch):
            raise UserError(
                f"--method {settings.method}: the loss of an image depends on the others of its batch, which must come "
                "in one piece: run one process without --micro-batch."
            )
        if settings.augment != "none" and isinstance(settings.objective, Stores):
            raise UserError(
                f"--augment {settings.augment}: {settings.objective.name} trains on what it made of each image before "
                "the first step; leave it out."
            )
        self.model, self.original = self._load(), self._load()  # what trains; what it was, until the result is written
        self.weights_hash = self.model.weights_hash
        classes = None if settings.classes is None else lines_of(settings.classes)
        found = load_dataset(
            settings.dataset, settings.split, limit=settings.limit, root=settings.root, classes=classes
        )
        self.images, self.held_out = hold_out(found, min(settings.held_out, len(found) // 5), settings.seed)
        size = None if settings.pixel_space == "native" else self.model.image_size
        self.transform = PixelTransform(size, self.model.interpolation)
        self.student = self._student()

    def run(self, progress: Progress) -> Trained:
        """Train, or go on, or find it done; write the result and what is mixed from it. ``progress`` hears of it."""
        with deterministic(), self.folder.writing() if self.processes.is_main else nullcontext():
            return self._run(progress)

    def cost(self) -> StageCost:
        """What training will cost."""
        return stage_cost(self.settings.stage, self.settings.optimization, len(self.images))

    def memory(self) -> MemoryCost:
        """What it will take, estimated with one image."""
        return memory_cost(self.student, self.original.clip, self.settings.optimization, self.model.image_size)

    def _run(self, progress: Progress) -> Trained:
        settings, main = self.settings, self.processes.is_main
        if main:
            self.folder.check_settings(self._facts())
        summary = self.folder.summary() if main else {}
        held_out = self._held_out_batch()
        judge = None if held_out is None else partial(self._judge, held_out)
        tracking = Tracking(settings.track, self.processes, self.folder.training, self._facts())
        training = Run(
            self.student,
            self._teacher(),
            self._training_images(),
            [settings.stage],
            settings.optimization,
            self.folder.training,
            judge=None if judge is None else partial(judge, self.model),
            progress=progress,
            tracking=tracking,
            save_every=settings.save_every,
            augment=AUGMENTATIONS[settings.augment],
        )
        self.processes.wait()
        memory = training.run()
        tracking.close()
        if settings.select == "best":
            put_(self.student.weights(), memory.best)
        before: dict[str, Any] = summary.get("measured", {})
        done = self.processes.sum_numbers(dict.fromkeys(before, 1.0))  # the main process's, known to all
        outcome = Outcome(settings, self.processes, self.folder, self.model, self.original, self._origin())
        made = outcome.write(judge, frozenset(done), steps=memory.position.done)
        if made and main:
            self.folder.write_summary({"measured": before | made, "epochs": memory.epochs, "finished": True})
        measured = before | made
        read = {name: Accuracies.read(measured[name]) for name in outcome.shares if measured.get(name)}
        return Trained(self.folder.out, read, not made)

    def _load(self) -> VisionLanguageModel:
        return load_model(self.settings.model, weights=self.settings.weights, device=self.processes.device)

    def _student(self) -> TrainedStudent:
        classifier = self._classifier(self.model, self.settings.batch_norm)
        parts = self.settings.trains
        parameters = choose_prompts(classifier, parts, self.settings.seed) or choose_adapters(
            classifier, parts, self.settings.seed
        )
        return TrainedStudent(classifier, parameters or choose_trained(classifier, parts), self.processes)

    def _training_images(self) -> Images:
        images = TrainingImages(self.images, self.transform, skip_bad=self.settings.skip_bad)
        objective = self.settings.objective
        if isinstance(objective, Stores):
            return store_features(objective, self.student, images, self.folder.training, self.settings.seed)
        return images

    def _teacher(self) -> AutocastTeacher | None:
        if self.settings.objective.teacher == "none":
            return None
        return AutocastTeacher(self._classifier(self.original), self.processes)

    def _classifier(self, model: VisionLanguageModel, batch_norm: BatchNormPolicy = "frozen") -> TrainedClassifier:
        return TrainedClassifier(
            model,
            self.images.class_names,
            self.settings.templates,
            normalization=self.settings.normalization,
            logit_scale=self.settings.scale,
            resize_inside=self.settings.pixel_space == "native",
            batch_norm=batch_norm,
        )

    def _deployed(self, model: VisionLanguageModel) -> Pipeline:
        """As it is used and measured: with its own logit scale, which the strength of attacks depends on."""
        return model.zero_shot(
            self.images.class_names,
            self.settings.templates,
            normalization=self.settings.normalization,
            resize_inside=self.settings.pixel_space == "native",
        )

    def _held_out_batch(self) -> Batch | None:
        if not len(self.held_out):
            return None
        reader = TrainingImages(self.held_out, self.transform, skip_bad=self.settings.skip_bad)
        return reader.batch(range(len(self.held_out)))

    def _judge(self, batch: Batch, model: VisionLanguageModel) -> Accuracies:
        return accuracies(self._deployed(model), batch, self.settings.radius, self.settings.seed, self.processes)

    def _origin(self) -> dict[str, Any]:
        """What the result was made of, for its folder."""
        return {
            "vanilla_weights_hash": self.weights_hash,
            "training_ids_hash": self.images.ids_hash,
            "training_images": len(self.images),
            "class_names": list(self.images.class_names),
        }

    def _facts(self) -> dict[str, Any]:
        """What must not change between the beginning of a run and its end."""
        return {
            **self.settings.decisive(),
            "weights": self.weights_hash,
            "training_images": self.images.ids_hash,
            "held_out_images": self.held_out.ids_hash,
        }
