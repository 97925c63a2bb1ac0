"""A training-time defense from settings to a model folder: the model, the images, one stage, the result."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmdefend.data import load_dataset
from vlmdefend.data.transforms import PixelTransform
from vlmdefend.errors import UserError
from vlmdefend.models import load_model
from vlmdefend.models.checkpoint import save_folder
from vlmdefend.models.vision_language import VisionLanguageModel
from vlmdefend.training.adapters import choose_adapters, folded
from vlmdefend.training.classifier import BatchNormPolicy, TrainedClassifier, choose_trained, statistics
from vlmdefend.training.cost import MemoryCost, StageCost, memory_cost, stage_cost
from vlmdefend.training.data import Images, TrainingImages, hold_out
from vlmdefend.training.folder import TRAINING, RunFolder
from vlmdefend.training.held_out import accuracies
from vlmdefend.training.listener import Accuracies, Counted, Listener
from vlmdefend.training.log import Tracking, check_tracker
from vlmdefend.training.loop import Run
from vlmdefend.training.processes import Processes, deterministic
from vlmdefend.training.prompts import choose_prompts
from vlmdefend.training.run_settings import lines_of
from vlmdefend.training.stored import Stores, store_features
from vlmdefend.training.student import AutocastTeacher, TrainedStudent
from vlmdefend.training.train_settings import TrainSettings
from vlmdefend.training.weights import put_
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

    def run(self, listener: Listener) -> Trained:
        """Train, or go on, or find it done; write the result and what is mixed from it. ``listener`` hears of it."""
        with deterministic(), self.folder.writing() if self.processes.is_main else nullcontext():
            return self._run(listener)

    def cost(self) -> StageCost:
        """What training will cost."""
        return stage_cost(self.settings.stage, self.settings.optimization, len(self.images))

    def memory(self) -> MemoryCost:
        """What it will take, estimated with one image."""
        return memory_cost(self.student, self.original.clip, self.settings.optimization, self.model.image_size)

    def _run(self, listener: Listener) -> Trained:
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
            listener=listener,
            tracking=tracking,
            save_every=settings.save_every,
        )
        self.processes.wait()
        memory = training.run()
        tracking.close()
        if settings.select == "best":
            put_(self.student.weights(), memory.best)
        before: dict[str, Any] = summary.get("measured", {})
        done = self.processes.sum_numbers(dict.fromkeys(before, 1.0))  # the main process's, known to all
        made = self._finish(judge, frozenset(done), steps=memory.position.done)
        if made and main:
            self.folder.write_summary({"measured": before | made, "epochs": memory.epochs, "finished": True})
        shown = ("vanilla", "result", *(mixed_name(share) for share in settings.mix))
        measured = before | made
        read = {name: _read_accuracies(measured[name]) for name in shown if measured.get(name)}
        return Trained(self.folder.out, read, not made)

    def _finish(
        self, judge: Callable[[VisionLanguageModel], Accuracies] | None, done: frozenset[str], *, steps: int
    ) -> dict[str, Any]:
        """Measure and write what is not there yet: the result, then each mixture of it with the vanilla weights."""
        clip = self.original.clip
        vanilla = {name: tensor.detach().clone() for name, tensor in clip.state_dict().items()}
        trained = folded(self.model.clip, vanilla)
        made: dict[str, Any] = {}
        shares = {"vanilla": 0.0, "result": 1.0} | {mixed_name(share): share for share in self.settings.mix}
        for name, share in shares.items():
            if name in done or (name == "vanilla" and judge is None):
                continue
            clip.load_state_dict({key: _between(vanilla[key], trained[key], share) for key in vanilla})
            if name != "vanilla" and self.settings.objective.learns and self.model.prompts is not None:
                self.original.add_prompts(self.model.prompts.deployed())  # there is no mixture after it
            made[name] = [] if judge is None else [list(counts) for counts in judge(self.original)]
            if self.processes.is_main and name != "vanilla":
                folder = self.folder.out if name == "result" else self.folder.out / name
                self._save(folder, {"part": name, "steps": steps, "mix": share, "held_out": dict(made)})
            self.processes.wait()
        return made

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

    def _save(self, folder: Path, facts: dict[str, Any]) -> None:
        """Write the model that was, with its present weights, and the normalisation that they were trained with."""
        mean, std = statistics(self.original, self.settings.normalization)
        self.original.preprocess_cfg |= {"mean": list(mean), "std": list(std)}
        metadata = {
            "method": self.settings.method,
            "made_by": "vlmdefend train",
            "settings": self.settings.model_dump(mode="json"),
            "vanilla_weights_hash": self.weights_hash,
            "training_ids_hash": self.images.ids_hash,
            "training_images": len(self.images),
            "class_names": list(self.images.class_names),
        }
        save_folder(self.original, folder, metadata | facts, beside=(TRAINING,))

    def _facts(self) -> dict[str, Any]:
        """What must not change between the beginning of a run and its end."""
        return {
            **self.settings.decisive(),
            "weights": self.weights_hash,
            "training_images": self.images.ids_hash,
            "held_out_images": self.held_out.ids_hash,
        }


def mixed_name(share: float) -> str:
    """The folder of a mixture, inside of the result's."""
    return f"mix-{share:g}"


def _between(vanilla: Tensor, trained: Tensor, share: float) -> Tensor:
    """``(1 - share) vanilla + share trained`` (Wortsman et al. 2022, WiSE-FT); either end to the last bit."""
    if share in (0.0, 1.0) or not vanilla.is_floating_point():
        return trained if share else vanilla
    return vanilla.lerp(trained, share)


def _read_accuracies(written: Any) -> Accuracies:
    clean, robust = written
    return Accuracies(Counted(*clean), Counted(*robust))
