"""The job of `distill`: HPT-GPD from settings to a model folder."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from vlmdefend.defenses.training_time.hpt_gpd import HptGpd
from vlmdefend.progress import Progress
from vlmdefend.training.clip.clip_job import ClipJob
from vlmdefend.training.clip.distillation_models import DistillationModels
from vlmdefend.training.clip.held_out import proxy_gap
from vlmdefend.training.clip.student import ClipStudent
from vlmdefend.training.job import JobResult
from vlmdefend.training.loop.cost import MemoryCost, StageCost, memory_cost, stage_cost
from vlmdefend.training.loop.results import Accuracies, HitCount, ProxyGap
from vlmdefend.training.loop.stage import Optimization, Stage
from vlmdefend.training.loop.trainer_state import TrainerState
from vlmdefend.training.loop.weight_averages import Weights, copied, put_, weights_hash
from vlmdefend.training.settings.distill_settings import DistillSettings
from vlmdefend.types import Batch

SHARE_KEPT = 0.75  # every proxy of the paper keeps this share of its clean accuracy on the target's adversarial images
VERSIONS = ("vanilla", "pivot", "result")


@dataclass(frozen=True, kw_only=True)
class Distilled(JobResult):
    """The result of `distill`."""

    summary: dict[str, Accuracies]  # by name in VERSIONS, on the held-out images; empty if nothing is held out
    gap: ProxyGap | None  # None: not measured


class DistillationJob(ClipJob[DistillSettings, Distilled]):
    """Distills a proxy into a target with HPT-GPD; :meth:`costs` and :meth:`memory` give estimates before it starts."""

    def open(self) -> None:
        """Loads target and proxy, and opens the images."""
        self.models = DistillationModels(self.settings, self.processes)
        self.open_images(self.models.target)
        self.models.class_names = self.images.class_names

    def costs(self) -> list[StageCost]:
        """Estimates the forward and backward passes of each stage."""
        return [stage_cost(stage, self._optimization(), len(self.images)) for stage in self.stages()]

    def memory(self) -> MemoryCost:
        """Estimates the memory of the training, measured with one image."""
        side = self.models.target.image_size
        return memory_cost(self.models.student(), self.models.proxy.clip, self._optimization(), side)

    def stages(self) -> list[Stage]:
        """Returns the stages to run, of a and b.

        Stage a trains with GA at a low rate and averages its weights into the pivot. Stage b starts from the vanilla
        weights again, trains with HPT, and is pulled towards the pivot.
        """
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

    @cached_property
    def given_pivot(self) -> Weights | None:
        """The weights of ``--pivot``, if given."""
        return None if self.settings.pivot is None else self.models.read_pivot(self.settings.pivot)

    def facts(self) -> dict[str, Any]:
        """Returns settings and hashes of both models, the images and a given pivot."""
        return {
            **self.settings.decisive(),
            **self.models.hashes,
            **self.image_facts(),
            "pivot_weights": None if self.given_pivot is None else weights_hash(self.given_pivot),
        }

    def train(self, progress: Progress, summary: dict[str, Any]) -> Distilled:
        """Measures the proxy gap, runs the stages, then measures and writes pivot and result."""
        settings = self.settings
        student = self.models.student()
        vanilla, held_out = copied(student.weights()), self.held_out_batch
        gap = self._gap_before(held_out, summary)
        if gap is not None:
            progress.measured(gap)
        state = self.fit(
            student,
            self.models.teacher(),
            self.training_images,
            self.stages(),
            self._optimization(),
            self.folder.training,
            progress,
            measure=None if held_out is None else self._target_accuracies,
            count=None if held_out is None or not settings.gap_images else partial(self._proxy_count, held_out),
            pivot=self.given_pivot,
        )
        reused = self.processes.sum_numbers({"finished": float("finished" in summary)})["finished"] > 0
        if not reused:
            summary |= self._finish(student, state, vanilla)
            if self.processes.is_main:
                self.folder.write_summary(summary)
        read = {name: Accuracies.read(summary[name]) for name in VERSIONS if name in summary}
        return Distilled(out=self.folder.out, summary=read, gap=gap, reused=reused)

    def _finish(self, student: ClipStudent, state: TrainerState, vanilla: Weights) -> dict[str, Any]:
        """Measures vanilla, pivot and result, writes model folders of the last two, and returns the summary."""
        result = state.best if self.settings.select == "best" else copied(student.weights())
        if self.settings.stage == "a" and state.pivot is not None:
            result = state.pivot
        facts = {"training_ids_hash": self.images.ids_hash, "training_images": len(self.images)}
        facts |= {"steps": state.position.done}
        measured: dict[str, Any] = {}
        for name, weights in zip(VERSIONS, (vanilla, state.pivot, result), strict=True):
            if weights is None:
                continue
            put_(student.weights(), weights)
            student.refresh()
            if self.held_out_batch is not None:
                measured[name] = [list(counts) for counts in self._target_accuracies()]
            if self.processes.is_main and name != "vanilla":
                folder = self.folder.pivot if name == "pivot" else self.folder.out
                self.models.save_target(folder, {"part": name, **facts, "held_out": dict(measured)})
            self.processes.wait()
        return {**measured, "epochs": state.epochs, "finished": True}

    def _optimization(self) -> Optimization:
        names = ("optimizer", "momentum", "weight_decay", "warm_up", "clip", "batch_size", "micro_batch", "seed")
        return Optimization(**{name: getattr(self.settings, name) for name in names})

    def _target_accuracies(self) -> Accuracies:
        """Returns accuracies of the target with its present weights, on the held-out images."""
        return self.held_out_accuracies(self.models.deployed(self.models.target))

    def _gap_before(self, held_out: Batch | None, summary: dict[str, Any]) -> ProxyGap | None:
        """Returns the proxy gap of the vanilla target, measured once and by the main process alone (others: None)."""
        if held_out is None or not self.settings.gap_images or not self.processes.is_main:
            return None
        if "gap" not in summary:
            found = self._gap_on(held_out, self._gap_index(held_out))
            summary["gap"] = {"clean": found.clean, "adversarial": found.adversarial}
            self.folder.write_summary(summary)
        counts = {
            kind: {name: HitCount(*pair) for name, pair in found.items()} for kind, found in summary["gap"].items()
        }
        return ProxyGap(self.settings.target, counts["clean"], counts["adversarial"])

    def _proxy_count(self, held_out: Batch) -> dict[str, HitCount]:
        """Counts the proxy's hits on adversarial images of the target in training: both fail together more and more."""
        index = self._gap_index(held_out)
        mine = self.processes.share(index)
        hits = self._gap_on(held_out, mine).adversarial["proxy"].hits if mine else 0
        total = self.processes.sum_numbers({"hits": float(hits)})["hits"]
        return {"proxy_on_adversarial": HitCount(int(total), len(index))}

    def _gap_index(self, held_out: Batch) -> list[int]:
        """Returns the positions of the ``--gap-images`` images in the batch, class-balanced: sets may be sorted."""
        chosen = frozenset(self.held_out.subset(self.settings.gap_images, self.settings.seed).ids)
        return [i for i, name in enumerate(held_out.ids) if name in chosen]

    def _gap_on(self, held_out: Batch, index: list[int]) -> ProxyGap:
        """Measures the proxy gap on some of the held-out images."""
        device = self.processes.device
        ids = [held_out.ids[i] for i in index]
        batch = Batch(ids, held_out.images[index].to(device), held_out.labels[index].to(device))
        models = {"target": self.models.deployed(self.models.target), "proxy": self.models.deployed(self.models.proxy)}
        return proxy_gap("target", models, batch, self.settings.radius, self.settings.seed)


def warnings_of(gap: ProxyGap) -> list[str]:
    """Returns warnings where sections 5.5 and 5.7 of the paper advise against this pair of models."""
    found = []
    clean, kept = gap.clean["proxy"], gap.adversarial["proxy"]
    if kept.hits < SHARE_KEPT * clean.hits:
        found.append(
            f"on the target's adversarial images the proxy keeps {100 * kept.share:.1f} % of "
            f"{100 * clean.share:.1f} %, less than three quarters: little robustness to transfer (Fu et al. 2026, 5.5)."
        )
    if clean.hits < gap.clean["target"].hits:
        found.append(
            f"the proxy generalises less well than the target ({100 * clean.share:.1f} % against "
            f"{100 * gap.clean['target'].share:.1f} % clean): the paper advises the opposite (5.7)."
        )
    return found
