"""The job of `train`: a training-time defense from settings to a model folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vlmdefend.errors import UserError
from vlmdefend.models import load_model
from vlmdefend.models.clip.vision_language import VisionLanguageModel
from vlmdefend.progress import Progress
from vlmdefend.training.clip.adapters import choose_adapters
from vlmdefend.training.clip.augment import AUGMENTATIONS
from vlmdefend.training.clip.classifier import BatchNormPolicy, TrainedClassifier, choose_trained
from vlmdefend.training.clip.clip_job import ClipJob
from vlmdefend.training.clip.prompts import choose_prompts
from vlmdefend.training.clip.result_writer import ResultWriter
from vlmdefend.training.clip.stored_features import StoresFeatures, store_features
from vlmdefend.training.clip.student import AutocastTeacher, ClipStudent
from vlmdefend.training.job import JobResult
from vlmdefend.training.loop.cost import MemoryCost, StageCost, memory_cost, stage_cost
from vlmdefend.training.loop.data import Images
from vlmdefend.training.loop.results import Accuracies
from vlmdefend.training.loop.weight_averages import put_
from vlmdefend.training.settings.train_settings import TrainSettings
from vlmdefend.types import Pipeline


@dataclass(frozen=True, kw_only=True)
class Trained(JobResult):
    """The result of `train`."""

    summary: dict[str, Accuracies]  # "vanilla", "result", "mix-0.5" ... on the held-out images; empty if there are none


class DefenseTrainingJob(ClipJob[TrainSettings, Trained]):
    """Trains a CLIP with a training-time defense; :meth:`cost` and :meth:`memory` give estimates before it starts."""

    def check_inputs(self) -> None:
        """Refuses settings or a number of processes that the method cannot work with."""
        super().check_inputs()
        settings = self.settings
        if settings.objective.whole_batch and (self.processes.count > 1 or settings.micro_batch):
            raise UserError(
                f"--method {settings.method}: the loss of an image depends on the others of its batch, which must come "
                "in one piece: run one process without --micro-batch."
            )
        if settings.augment != "none" and isinstance(settings.objective, StoresFeatures):
            raise UserError(
                f"--augment {settings.augment}: {settings.objective.name} trains on features that it stores before the "
                "first step; leave it out."
            )

    def open(self) -> None:
        """Loads the model twice (one is trained, the other keeps the vanilla weights) and opens the images."""
        self.model, self.original = self._load(), self._load()
        self.weights_hash = self.model.weights_hash
        self.open_images(self.model)
        self.student = self._student()

    def cost(self) -> StageCost:
        """Estimates the forward and backward passes of the training."""
        return stage_cost(self.settings.stage, self.settings.optimization, len(self.images))

    def memory(self) -> MemoryCost:
        """Estimates the memory of the training, measured with one image."""
        return memory_cost(self.student, self.original.clip, self.settings.optimization, self.model.image_size)

    def facts(self) -> dict[str, Any]:
        """Returns settings and hashes of the model and the images."""
        return {**self.settings.decisive(), "weights": self.weights_hash, **self.image_facts()}

    def train(self, progress: Progress, summary: dict[str, Any]) -> Trained:
        """Runs the stage, then measures and writes the result and its mixtures with the vanilla weights."""
        settings = self.settings
        has_held_out = self.held_out_batch is not None
        state = self.fit(
            self.student,
            self._teacher(),
            self._images(),
            [settings.stage],
            settings.optimization,
            self.folder.training,
            progress,
            measure=(lambda: self._accuracies(self.model)) if has_held_out else None,
            augment=AUGMENTATIONS[settings.augment],
        )
        if settings.select == "best":
            put_(self.student.weights(), state.best)
        before: dict[str, Any] = summary.get("measured", {})
        done = self.processes.sum_numbers(dict.fromkeys(before, 1.0))  # sends the main process's names to all
        writer = ResultWriter(settings, self.processes, self.folder, self.model, self.original, self._origin())
        made = writer.write(self._accuracies if has_held_out else None, frozenset(done), steps=state.position.done)
        if made and self.processes.is_main:
            self.folder.write_summary({"measured": before | made, "epochs": state.epochs, "finished": True})
        measured = before | made
        read = {name: Accuracies.read(measured[name]) for name in writer.shares if measured.get(name)}
        return Trained(out=self.folder.out, summary=read, reused=not made)

    def _load(self) -> VisionLanguageModel:
        return load_model(self.settings.model, weights=self.settings.weights, device=self.processes.device)

    def _student(self) -> ClipStudent:
        """Returns the model as student, with the prompts, adapters or weights that ``--trains`` names."""
        classifier = self._classifier(self.model, self.settings.batch_norm)
        parts = self.settings.trains
        parameters = choose_prompts(classifier, parts, self.settings.seed) or choose_adapters(
            classifier, parts, self.settings.seed
        )
        return ClipStudent(classifier, parameters or choose_trained(classifier, parts), self.processes)

    def _images(self) -> Images:
        """Returns what the batches are made of: images, or the features that the objective stores of them."""
        images = self.training_images
        objective = self.settings.objective
        if isinstance(objective, StoresFeatures):
            return store_features(objective, self.student, images, self.folder.training, self.settings.seed)
        return images

    def _teacher(self) -> AutocastTeacher | None:
        """Returns the vanilla model as teacher if the objective has one."""
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
        """Returns the pipeline of a model for measurement, with its own logit scale, which attacks depend on."""
        return model.zero_shot(
            self.images.class_names,
            self.settings.templates,
            normalization=self.settings.normalization,
            resize_inside=self.settings.pixel_space == "native",
        )

    def _accuracies(self, model: VisionLanguageModel) -> Accuracies:
        """Returns the accuracies of a model on the held-out images."""
        return self.held_out_accuracies(self._deployed(model))

    def _origin(self) -> dict[str, Any]:
        """Returns hashes of the model and images that the result was trained from, for its metadata."""
        return {
            "vanilla_weights_hash": self.weights_hash,
            "training_ids_hash": self.images.ids_hash,
            "training_images": len(self.images),
            "class_names": list(self.images.class_names),
        }
