"""Computes one cell shard by shard: predicts, attacks correctly classified images, predicts again, checks distances."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from vlmdefend.attacks.base import Attack
from vlmdefend.attacks.criterion import Criterion
from vlmdefend.attacks.view import chunks
from vlmdefend.data.base import ImageSet
from vlmdefend.data.loader import load_batch
from vlmdefend.data.transforms import PixelTransform
from vlmdefend.defenses.base import Defense
from vlmdefend.errors import UserError
from vlmdefend.evaluation.cell.attack_result import BatchResult, attack_batch
from vlmdefend.evaluation.cell.defended_model import DefendedModel
from vlmdefend.evaluation.cell.fitted_attacks import fit_attack, sample, unfitted
from vlmdefend.evaluation.store.environment import environment, peak_memory_mb, reset_peak_memory
from vlmdefend.evaluation.store.records import Cell, Checks, Cost, ImageRow, Record, Skipped
from vlmdefend.evaluation.store.run_folder import CellWriter, StoredShard
from vlmdefend.progress import Progress
from vlmdefend.types import Batch, Outputs, Pipeline, Threat

Result = TypeVar("Result")


@dataclass
class CellEvaluator:
    """Evaluates one cell: runs the attack on the defended model, returns a record and one row per image."""

    cell: Cell
    model: Pipeline
    defense: Defense
    attack: Attack
    images: ImageSet
    transform: PixelTransform
    device: torch.device
    skip_bad: bool
    learned_prompt: str = ""  # the learned context that the model uses in place of the templates
    keep: Callable[[int, Tensor], None] | None = None  # stores a shard's images before the shard counts as done

    def __post_init__(self) -> None:
        self.deployed = DefendedModel(self.cell, self.model, self.defense)
        self.fitted = unfitted(self.deployed, self.attack)

    def run(self, writer: CellWriter, progress: Progress) -> tuple[Record, list[ImageRow]]:
        """Computes the shards that are missing, then writes rows and record."""
        started = datetime.now(UTC).isoformat(timespec="seconds")
        done = writer.finished_shards()
        progress.advance(self.cell, sum(len(s.rows) + len(s.skipped) for s in done))
        shards = list(chunks(len(self.images), self.cell.shard_size))
        # attacked prompts are part of the record but of no shard, so they are fitted again after a kill
        if self.attack.learns_from and self.cell.eps > 0 and (len(done) < len(shards) or self.attack.changes_prompts):
            self._within_memory(self._fit_attack, progress)
        for number in range(len(done), len(shards)):
            shard = self._within_memory(partial(self._shard, number, shards[number].tolist()), progress)
            writer.add(shard)
            done.append(shard)
            progress.advance(self.cell, len(shard.rows) + len(shard.skipped))
        record, rows = self._record(done, started)
        writer.finish(record, rows)
        return record, rows

    def _record(self, done: list[StoredShard], started: str) -> tuple[Record, list[ImageRow]]:
        """Returns the record (sums over all shards) and the rows of all shards.

        Raises:
            UserError: every image was skipped.
        """
        rows = [row for shard in done for row in shard.rows]
        if not rows:
            raise UserError(f"{self.cell.title()}: no image was left to evaluate; all were skipped as bad.")
        record = Record(
            key=self.cell.key,
            cell=self.cell,
            status="done",
            n=len(rows),
            clean_correct=sum(row.clean_correct for row in rows),
            robust=sum(row.robust for row in rows),
            skipped=[s for shard in done for s in shard.skipped],
            cost=sum((shard.cost for shard in done), Cost()),
            checks=sum((shard.checks for shard in done), Checks()),
            stochastic=self.defense.stochastic,
            adaptive_equals_whitebox=self.defense.adaptive_equals_whitebox,
            blind=self.attack.blind,
            gradient_free=self.attack.gradient_free,
            set_level=self.attack.set_level,
            learned_prompt=self.learned_prompt,
            attacked_prompts=self.fitted.attacked_prompts(),
            paradigm=self.defense.paradigm,
            environment=environment(self.device),
            started=started,
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        return record, rows

    def _within_memory(self, compute: Callable[[], Result], progress: Progress) -> Result:
        """Halves the batch when memory runs out, and computes the shard (or the fit) again from its start."""
        while True:
            try:
                return compute()
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                if self.deployed.width == 1:
                    raise UserError(f"{self.cell.title()}: a single image does not fit into memory.") from None
            self.deployed.width //= 2
            progress.note(f"out of memory: the batch is halved to {self.deployed.width} images")

    def _load(self, index: list[int]) -> tuple[Batch, list[Skipped]]:
        """Returns the images at ``index`` on the device, and those that cannot be read."""
        batch, bad = load_batch(self.images, index, self.transform, skip_bad=self.skip_bad)
        on_device = Batch(batch.ids, batch.images.to(self.device), batch.labels.to(self.device))
        return on_device, [Skipped(id=name, reason=reason) for name, reason in bad]

    def _fit_attack(self) -> None:
        """Fits the attack to a sample of the images."""
        batch, _ = self._load(sample(len(self.images), self.attack.learns_from))
        self.fitted = fit_attack(self.deployed, self.attack, batch)

    def _shard(self, number: int, index: list[int]) -> StoredShard:
        """Computes one shard: predicts it, attacks the correctly classified images, predicts again."""
        batch, skipped = self._load(index)
        if not batch.ids:
            return StoredShard(number, [], skipped, Cost(), Checks())
        reset_peak_memory(self.device)
        checks = self.deployed.check(batch) if number == 0 else Checks()
        spent, threat = self.deployed.counted.spent, Threat(self.cell.norm, self.cell.eps)

        before = spent()
        clean = self.deployed.predict(batch.images, batch.ids)
        predicted = spent()
        right = (clean.predictions == batch.labels).nonzero()[:, 0]
        attacked = attack_batch(self.deployed, self.fitted, batch, right, threat)
        to_predict, to_attack = predicted.since(before), spent().since(predicted)
        cost = Cost(
            clean_images=len(batch.ids),
            clean_forwards=to_predict.forwards,
            clean_backwards=to_predict.backwards,
            clean_seconds=to_predict.seconds,
            attack_images=len(right),
            attack_forwards=to_attack.forwards,
            attack_backwards=to_attack.backwards,
            attack_seconds=to_attack.seconds,
            peak_memory_mb=peak_memory_mb(self.device),
        )
        with self.fitted.conditions():
            final = self.deployed.predict(attacked.images, batch.ids)
        rows = self._rows(batch, clean, final, attacked, threat.distance(attacked.images, batch.images))
        if self.keep is not None:
            self.keep(number, attacked.images)
        if number == 0:
            checks, cost = checks + self.fitted.checks, cost + self.fitted.cost
        checks = checks + attacked.checks + self._check_survivors(rows, right.tolist())
        return StoredShard(number, rows, skipped, cost, checks)

    def _rows(
        self, batch: Batch, clean: Outputs, final: Outputs, attacked: BatchResult, distance: Tensor
    ) -> list[ImageRow]:
        """Returns one row per image of a batch."""
        criterion, radius = Criterion(batch.labels), clean.certified_radius
        columns: dict[str, Sequence[Any]] = {
            "id": batch.ids,
            "label": batch.labels.tolist(),
            "clean_prediction": clean.predictions.tolist(),
            "clean_margin": criterion.margin(clean.logits).tolist(),
            "adversarial_prediction": final.predictions.tolist(),
            "adversarial_margin": criterion.margin(final.logits).tolist(),
            "distance": distance.tolist(),
            "steps": attacked.steps.tolist(),
            "certified_radius": [None] * len(batch.ids) if radius is None else radius.tolist(),
            "clean_score": self.deployed.scores(clean),
            "adversarial_score": self.deployed.scores(final),
        }
        return [ImageRow(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]

    def _check_survivors(self, rows: list[ImageRow], right: list[int]) -> Checks:
        """Counts attacked images that stayed correct, and those whose margin the attack did not raise."""
        raises_margin = self.cell.eps > 0 and not self.attack.blind and not self.attack.set_level
        survivors = [rows[i] for i in right if rows[i].robust] if raises_margin else []
        return Checks(
            attacked_survivors=len(survivors),
            loss_not_rising=sum(row.adversarial_margin <= row.clean_margin for row in survivors),
        )


def _is_out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text or "out of memory" in text
