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
from vlmdefend.progress import Progress
from vlmdefend.training.clip.distill_settings import DistillSettings
from vlmdefend.training.clip.held_out import accuracies, proxy_gap
from vlmdefend.training.clip.pair import Pair
from vlmdefend.training.loop.cost import MemoryCost, StageCost, memory_cost, stage_cost
from vlmdefend.training.loop.data import TrainingImages, hold_out
from vlmdefend.training.loop.folder import RunFolder
from vlmdefend.training.loop.log import Tracking, check_tracker
from vlmdefend.training.loop.processes import Processes, deterministic
from vlmdefend.training.loop.results import Accuracies, HitCount, ProxyGap
from vlmdefend.training.loop.stage import Optimization, Stage
from vlmdefend.training.loop.student import TrainedStudent
from vlmdefend.training.loop.trainer import Run
from vlmdefend.training.loop.trainer_state import Memory
from vlmdefend.training.loop.weight_averages import Weights, copied, put_, weights_hash
from vlmdefend.training.settings.run_settings import lines_of
from vlmdefend.types import Batch

SHARE_KEPT = 0.75  # of its clean accuracy: what every proxy of the paper keeps on the target's adversarial images
VERSIONS = ("vanilla", "pivot", "result")


@dataclass(frozen=True)
class Distilled:
    """What a run made."""

    out: Path
    summary: dict[str, Accuracies]  # of VERSIONS, on the held-out images; empty if there are none
    gap: ProxyGap | None
    reused: bool  # nothing was left to do


@dataclass
class Distillation:
    """A run, made ready: models loaded, images opened, folder checked.

    Args:
        settings: every choice.

    Raises:
        UserError: what is missing or does not fit; nothing was trained.
    """

    settings: DistillSettings

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
        self.pair = Pair(settings, self.processes)
        classes = None if settings.classes is None else lines_of(settings.classes)
        found = load_dataset(
            settings.dataset, settings.split, limit=settings.limit, root=settings.root, classes=classes
        )
        self.pair.class_names = found.class_names
        self.images, self.held_out = hold_out(found, min(settings.held_out, len(found) // 5), settings.seed)
        size = None if settings.pixel_space == "native" else self.pair.target.image_size
        self.transform = PixelTransform(size, self.pair.target.interpolation)

    def run(self, progress: Progress) -> Distilled:
        """Train, or go on, or find it done; write the pivot and the result. ``progress`` hears of it."""
        with deterministic(), self.folder.writing() if self.processes.is_main else nullcontext():
            return self._run(progress)

    def costs(self) -> list[StageCost]:
        """What each stage will cost."""
        return [stage_cost(stage, self._optimization(), len(self.images)) for stage in self.stages()]

    def memory(self) -> MemoryCost:
        """What it will take, estimated with one image."""
        side = self.pair.target.image_size
        return memory_cost(self.pair.student(), self.pair.proxy.clip, self._optimization(), side)

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
        anchor, transfer = objective(anchored=True), objective(anchored=False)
        both = {
            "a": Stage(name="a", objective=anchor, epochs=settings.epochs_a, rate=settings.lr_a, ema=settings.ema),
            "b": Stage(
                name="b",
                objective=transfer,
                epochs=settings.epochs_b,
                rate=settings.lr_b,
                pull=settings.pull,
                pull_first=settings.pull_first,
            ),
        }
        return [both[name] for name in settings.stages]

    def _run(self, progress: Progress) -> Distilled:
        settings, main = self.settings, self.processes.is_main
        pivot = None if settings.pivot is None else self.pair.read_pivot(settings.pivot)
        if main:
            self.folder.check_settings(self._facts(pivot))
        summary = self.folder.summary() if main else {}
        student = self.pair.student()
        vanilla, held_out = copied(student.weights()), self._held_out_batch()
        gap = self._preflight(held_out, summary)
        if gap is not None:
            progress.measured(gap)
        judge = None if held_out is None else partial(self._judge, held_out)
        tracking = Tracking(settings.track, self.processes, self.folder.training, self._facts(pivot))
        training = Run(
            student,
            self.pair.teacher(),
            TrainingImages(self.images, self.transform, skip_bad=settings.skip_bad),
            self.stages(),
            self._optimization(),
            self.folder.training,
            judge=judge,
            probe=None if held_out is None or not settings.gap_images else partial(self._probe, held_out),
            progress=progress,
            tracking=tracking,
            pivot=pivot,
            save_every=settings.save_every,
        )
        self.processes.wait()
        memory = training.run()
        tracking.close()
        reused = self.processes.sum_numbers({"finished": float("finished" in summary)})["finished"] > 0
        if not reused:
            summary |= self._finish(student, memory, vanilla, judge)
            if main:
                self.folder.write_summary(summary)
        read = {name: Accuracies.read(summary[name]) for name in VERSIONS if name in summary}
        return Distilled(self.folder.out, read, gap, reused)

    def _finish(
        self, student: TrainedStudent, memory: Memory, vanilla: Weights, judge: Callable[[], Accuracies] | None
    ) -> dict[str, Any]:
        """Measure vanilla, pivot and result, write the folders of the last two."""
        result = memory.best if self.settings.select == "best" else copied(student.weights())
        if self.settings.stage == "a" and memory.pivot is not None:
            result = memory.pivot
        facts = {"training_ids_hash": self.images.ids_hash, "training_images": len(self.images)}
        facts |= {"steps": memory.position.done}
        measured: dict[str, Any] = {}
        for name, weights in zip(VERSIONS, (vanilla, memory.pivot, result), strict=True):
            if weights is None:
                continue
            put_(student.weights(), weights)
            student.refresh()
            if judge is not None:
                measured[name] = [list(counts) for counts in judge()]
            if self.processes.is_main and name != "vanilla":
                folder = self.folder.pivot if name == "pivot" else self.folder.out
                self.pair.save_target(folder, {"part": name, **facts, "held_out": dict(measured)})
            self.processes.wait()
        return {**measured, "epochs": memory.epochs, "finished": True}

    def _optimization(self) -> Optimization:
        names = ("optimizer", "momentum", "weight_decay", "warm_up", "clip", "batch_size", "micro_batch", "seed")
        return Optimization(**{name: getattr(self.settings, name) for name in names})

    def _held_out_batch(self) -> Batch | None:
        if not len(self.held_out):
            return None
        reader = TrainingImages(self.held_out, self.transform, skip_bad=self.settings.skip_bad)
        return reader.batch(range(len(self.held_out)))

    def _judge(self, batch: Batch) -> Accuracies:
        model = self.pair.deployed(self.pair.target)
        return accuracies(model, batch, self.settings.radius, self.settings.seed, self.processes)

    def _preflight(self, held_out: Batch | None, summary: dict[str, Any]) -> ProxyGap | None:
        """What the proxy makes of the vanilla target's adversarial images: measured once, by the main process."""
        if held_out is None or not self.settings.gap_images or not self.processes.is_main:
            return None
        if "gap" not in summary:
            found = self._gap_on(held_out, self._few(held_out))
            summary["gap"] = {"clean": found.clean, "adversarial": found.adversarial}
            self.folder.write_summary(summary)
        counts = {
            kind: {name: HitCount(*pair) for name, pair in found.items()} for kind, found in summary["gap"].items()
        }
        return ProxyGap(self.settings.target, counts["clean"], counts["adversarial"])

    def _probe(self, held_out: Batch) -> dict[str, HitCount]:
        """The proxy on the target's adversarial images again: as the target learns, both fail together more often."""
        few = self._few(held_out)
        mine = self.processes.share(few)
        hits = self._gap_on(held_out, mine).adversarial["proxy"].hits if mine else 0
        total = self.processes.sum_numbers({"hits": float(hits)})["hits"]
        return {"proxy_on_adversarial": HitCount(int(total), len(few))}

    def _few(self, held_out: Batch) -> list[int]:
        """Some of the held-out images, class-balanced: a set may be sorted by class."""
        chosen = frozenset(self.held_out.subset(self.settings.gap_images, self.settings.seed).ids)
        return [i for i, name in enumerate(held_out.ids) if name in chosen]

    def _gap_on(self, held_out: Batch, index: list[int]) -> ProxyGap:
        device = self.processes.device
        ids = [held_out.ids[i] for i in index]
        batch = Batch(ids, held_out.images[index].to(device), held_out.labels[index].to(device))
        models = {"target": self.pair.deployed(self.pair.target), "proxy": self.pair.deployed(self.pair.proxy)}
        return proxy_gap("target", models, batch, self.settings.radius, self.settings.seed)

    def _facts(self, pivot: Weights | None) -> dict[str, Any]:
        """What must not change between the beginning of a run and its end."""
        return {
            **self.settings.decisive(),
            **self.pair.hashes,
            "training_images": self.images.ids_hash,
            "held_out_images": self.held_out.ids_hash,
            "pivot_weights": None if pivot is None else weights_hash(pivot),
        }


def warnings_of(gap: ProxyGap) -> list[str]:
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
