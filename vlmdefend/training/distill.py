"""HPT-GPD from settings to a model folder: both models, the images, the proxy gap, the stages, the result."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vlmdefend.data import load_dataset
from vlmdefend.data.transforms import PixelTransform
from vlmdefend.defenses.training_time.hpt_gpd import HptGpd
from vlmdefend.errors import UserError
from vlmdefend.models import load_model
from vlmdefend.models.checkpoint import find_weights, read_weights, save_folder
from vlmdefend.models.vision_language import VisionLanguageModel
from vlmdefend.training.classifier import TrainedClassifier, choose_trained, statistics
from vlmdefend.training.cost import MemoryCost, StageCost, memory_cost, stage_cost
from vlmdefend.training.data import TrainingImages, hold_out
from vlmdefend.training.folder import PIVOT, TRAINING, RunFolder
from vlmdefend.training.held_out import accuracies, proxy_gap
from vlmdefend.training.listener import Accuracies, Counted, Gap, Listener
from vlmdefend.training.log import Tracking, check_tracker
from vlmdefend.training.loop import Run
from vlmdefend.training.memory import Memory
from vlmdefend.training.processes import Processes, deterministic
from vlmdefend.training.settings import Settings
from vlmdefend.training.stage import Optimization, Stage
from vlmdefend.training.student import AutocastTeacher, TrainedStudent
from vlmdefend.training.weights import Weights, copied, put_
from vlmdefend.types import Batch, Pipeline

SHARE_KEPT = 0.75  # of its clean accuracy: what every proxy of the paper keeps on the target's adversarial images


@dataclass(frozen=True)
class Distilled:
    """What a run made."""

    out: Path
    summary: dict[str, Accuracies]  # "vanilla", "pivot", "result" on the held-out images; empty if there are none
    gap: Gap | None
    reused: bool  # nothing was left to train


@dataclass
class Distillation:
    """A run, made ready: models loaded, images opened, folder checked.

    Args:
        settings: every choice.

    Raises:
        UserError: what is missing or does not fit; nothing was trained.
    """

    settings: Settings

    def __post_init__(self) -> None:
        settings = self.settings
        check_tracker(settings.track)
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.folder = RunFolder(settings.out)
        self.processes = Processes(settings.device, settings.precision)
        self.target = load_model(settings.target, weights=settings.weights, device=self.processes.device)
        self.proxy = load_model(settings.proxy, weights=settings.proxy_weights, device=self.processes.device)
        if self.target.weights_hash == self.proxy.weights_hash and not settings.force:
            raise UserError(
                f"{settings.target} and {settings.proxy} hold the same weights: a model has nothing to learn from "
                "itself; give a proxy of another architecture, or --force to try all the same."
            )
        classes = None if settings.classes is None else _lines_of(settings.classes)
        found = load_dataset(
            settings.dataset, settings.split, limit=settings.limit, root=settings.root, classes=classes
        )
        self.images, self.held_out = hold_out(found, min(settings.held_out, len(found) // 5), settings.seed)
        native = settings.pixel_space == "native"
        self.transform = PixelTransform(None if native else self.target.image_size, self.target.interpolation)
        self._check_processes()

    def run(self, listener: Listener) -> Distilled:
        """Train, or go on, or find it done; write the pivot and the result. ``listener`` hears of it."""
        with deterministic(), self.folder.writing() if self.processes.is_main else nullcontext():
            return self._run(listener)

    def costs(self) -> list[StageCost]:
        """What each stage will cost."""
        return [stage_cost(stage, self._optimization(), len(self.images)) for stage in self.stages()]

    def memory(self) -> MemoryCost:
        """What it will take, estimated with one image."""
        student = self._student()
        return memory_cost(student, self.proxy.clip, self._optimization(), self.target.image_size)

    def _run(self, listener: Listener) -> Distilled:
        settings, main = self.settings, self.processes.is_main
        pivot = None if settings.pivot is None else self._read_pivot(settings.pivot)
        if main:
            self.folder.check_settings(self._facts(pivot))
        self.processes.wait()
        student = self._student()
        vanilla = copied(student.weights())
        held_out = self._held_out_batch()
        summary = self.folder.summary() if main else {}
        gap = self._preflight(held_out, summary)
        if gap is not None:
            listener.gap(gap)
        judge = None if held_out is None else partial(self._judge, held_out)
        tracking = Tracking(settings.track, self.processes, self.folder.training, self._facts(pivot))
        training = Run(
            student,
            AutocastTeacher(self._classifier(self.proxy), self.processes),
            TrainingImages(self.images, self.transform, skip_bad=settings.skip_bad, threads=2),
            self.stages(),
            self._optimization(),
            self.folder.training,
            judge=judge,
            listener=listener,
            tracking=tracking,
            pivot=pivot,
            save_every=settings.save_every,
        )
        memory = training.run()
        tracking.close()
        reused = bool(summary.get("finished"))
        if not reused:
            summary |= self._finish(student, memory, vanilla, judge)
            if main:
                self.folder.write_summary(summary)
        names: tuple[str, ...] = ("vanilla", "pivot", "result")
        read = {name: _read_accuracies(summary[name]) for name in names if name in summary}
        return Distilled(self.folder.out, read, gap, reused)

    def stages(self) -> list[Stage]:
        """Stage a: GA at a low rate, averaged into the pivot. Stage b: from vanilla again, HPT, pulled to the pivot."""
        settings = self.settings
        objective = partial(
            HptGpd,
            direction=settings.direction,
            batch_reduction=settings.reduction,
            eps=settings.radius,
            steps=settings.steps,
            alpha=settings.step_size,
        )
        both = {
            "a": Stage(
                name="a",
                objective=objective(anchored=True),
                epochs=settings.epochs_a,
                rate=settings.lr_a,
                ema=settings.ema,
            ),
            "b": Stage(
                name="b",
                objective=objective(anchored=False),
                epochs=settings.epochs_b,
                rate=settings.lr_b,
                pull=settings.pull,
                pull_first=settings.pull_first,
            ),
        }
        return [both[name] for name in settings.stages]

    def _optimization(self) -> Optimization:
        names = ("optimizer", "momentum", "weight_decay", "warm_up", "clip", "batch_size", "micro_batch", "seed")
        return Optimization(**{name: getattr(self.settings, name) for name in names})

    def _classifier(self, model: VisionLanguageModel, batch_norm: Any = "frozen") -> TrainedClassifier:
        settings = self.settings
        return TrainedClassifier(
            model,
            self.images.class_names,
            settings.templates,
            normalization=settings.normalization,
            logit_scale=settings.scale,
            resize_inside=settings.pixel_space == "native" or model.image_size != self.target.image_size,
            batch_norm=batch_norm,
        )

    def _student(self) -> TrainedStudent:
        classifier = self._classifier(self.target, self.settings.batch_norm)
        return TrainedStudent(classifier, choose_trained(classifier, self.settings.trains), self.processes)

    def _deployed(self, model: VisionLanguageModel) -> Pipeline:
        """The model as it is used and measured: with its own logit scale, which the strength of attacks depends on."""
        return model.zero_shot(
            self.images.class_names,
            self.settings.templates,
            normalization=self.settings.normalization,
            resize_inside=self.settings.pixel_space == "native" or model.image_size != self.target.image_size,
        )

    def _held_out_batch(self) -> Batch | None:
        if not len(self.held_out):
            return None
        reader = TrainingImages(self.held_out, self.transform, skip_bad=self.settings.skip_bad)
        return reader.batch(range(len(self.held_out)))

    def _judge(self, batch: Batch) -> Accuracies:
        return accuracies(self._deployed(self.target), batch, self.settings.radius, self.settings.seed, self.processes)

    def _preflight(self, held_out: Batch | None, summary: dict[str, Any]) -> Gap | None:
        """What the proxy makes of the vanilla target's adversarial images: measured once, by the main process."""
        if held_out is None or not self.settings.gap_images or not self.processes.is_main:
            return None
        if "gap" not in summary:
            few = min(self.settings.gap_images, len(held_out.ids))
            device = self.processes.device
            batch = Batch(held_out.ids[:few], held_out.images[:few].to(device), held_out.labels[:few].to(device))
            models = {"target": self._deployed(self.target), "proxy": self._deployed(self.proxy)}
            found = proxy_gap("target", models, batch, self.settings.radius, self.settings.seed)
            summary["gap"] = {"clean": found.clean, "adversarial": found.adversarial}
            self.folder.write_summary(summary)
        gap = summary["gap"]
        return Gap(
            self.settings.target,
            {name: Counted(*counts) for name, counts in gap["clean"].items()},
            {name: Counted(*counts) for name, counts in gap["adversarial"].items()},
        )

    def _finish(
        self, student: TrainedStudent, memory: Memory, vanilla: Weights, judge: Callable[[], Accuracies] | None
    ) -> dict[str, Any]:
        """Measure vanilla, pivot and result, write the folders of the last two."""
        last = copied(student.weights())
        result = memory.best if self.settings.select == "best" else last
        if self.settings.stage == "a":
            result = memory.pivot if memory.pivot is not None else last
        measured: dict[str, Any] = {}
        versions = {"vanilla": vanilla, "pivot": memory.pivot, "result": result}
        for name, weights in versions.items():
            if weights is None:
                continue
            put_(student.weights(), weights)
            student.classifier.refresh()
            if judge is not None:
                measured[name] = [list(counts) for counts in judge()]
            if self.processes.is_main and name != "vanilla":
                self._write(self.folder.pivot if name == "pivot" else self.folder.out, name, memory, measured)
            self.processes.wait()
        return {**measured, "epochs": memory.epochs, "finished": True}

    def _write(self, folder: Path, what: str, memory: Memory, measured: dict[str, Any]) -> None:
        mean, std = statistics(self.target, self.settings.normalization)
        self.target.preprocess_cfg |= {"mean": list(mean), "std": list(std)}  # what its weights now expect
        settings = self.settings.model_dump(mode="json")
        metadata = {
            "method": "hpt-gpd",
            "made_by": "vlmdefend distill",
            "part": what,
            "settings": settings,
            "target_weights_hash": self._hashes["target_weights"],
            "proxy_weights_hash": self._hashes["proxy_weights"],
            "training_ids_hash": self.images.ids_hash,
            "training_images": len(self.images),
            "class_names": list(self.images.class_names),
            "steps": memory.position.done,
            "held_out": measured,
        }
        save_folder(self.target, folder, metadata, beside=(TRAINING, PIVOT))

    def _read_pivot(self, path: Path) -> Weights:
        """The pivot's weights, by the names that train.

        Raises:
            UserError: a weight is missing or of another shape.
        """
        state = read_weights(find_weights(path) if path.is_dir() else path)
        found = {}
        for name, weight in self._student().weights().items():
            short = name.removeprefix("visual.")
            value = state.get(name, state.get(short))
            if value is None or value.shape != weight.shape:
                how = "missing" if value is None else f"of shape {tuple(value.shape)}, not {tuple(weight.shape)}"
                raise UserError(f"--pivot {path}: {name} is {how}; give the pivot of a run with the same target.")
            found[name] = value.to(weight.device, weight.dtype)
        return found

    def _facts(self, pivot: Weights | None) -> dict[str, Any]:
        """What must not change between the beginning of a run and its end."""
        if not hasattr(self, "_hashes"):
            self._hashes = {"target_weights": self.target.weights_hash, "proxy_weights": self.proxy.weights_hash}
        sums = None if pivot is None else float(sum(t.double().abs().sum() for t in pivot.values()))
        return {
            **self.settings.decisive(),
            **self._hashes,
            "training_images": self.images.ids_hash,
            "held_out_images": self.held_out.ids_hash,
            "pivot_weights": sums,
        }

    def _check_processes(self) -> None:
        if self.settings.batch_norm == "train" and (self.processes.count > 1 or self.settings.micro_batch):
            raise UserError(
                "--batch-norm train needs the whole batch in one forward: run one process without --micro-batch, or "
                "give --batch-norm frozen."
            )


def warnings_of(gap: Gap) -> list[str]:
    """What the paper's sections 5.5 and 5.7 say against this pair."""
    found = []
    clean, kept = gap.clean["proxy"], gap.adversarial["proxy"]
    if kept.hits < SHARE_KEPT * clean.hits:
        found.append(
            f"on the target's adversarial images the proxy keeps {100 * kept.share:.1f} % of "
            f"{100 * clean.share:.1f} %, less than three quarters: little robustness to pass on (Fu et al. 2026, 5.5)."
        )
    if clean.hits < gap.clean["target"].hits:
        found.append(
            f"the proxy generalises less well than the target ({100 * clean.share:.1f} % against "
            f"{100 * gap.clean['target'].share:.1f} % clean): the paper advises the opposite (5.7)."
        )
    return found


def _lines_of(file: Path) -> list[str]:
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError):
        raise UserError(f"--classes {file}: cannot be read; give a UTF-8 text file, one class name per line.") from None


def _read_accuracies(written: Any) -> Accuracies:
    clean, robust = written
    return Accuracies(Counted(*clean), Counted(*robust))
