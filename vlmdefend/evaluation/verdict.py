"""The verdict on one cell: shard by shard, attack what is right, re-predict, re-measure, trust nobody."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import UTC, datetime

import torch
from torch import Tensor

from vlmdefend.attacks.base import Attack
from vlmdefend.attacks.goal import Goal
from vlmdefend.attacks.view import chunks
from vlmdefend.data.base import ImageSet
from vlmdefend.data.loader import load_batch
from vlmdefend.data.transforms import PixelTransform
from vlmdefend.defenses.base import Defense
from vlmdefend.errors import UserError
from vlmdefend.evaluation.attackers import craft, detector_weights, fit
from vlmdefend.evaluation.counting import Counted
from vlmdefend.evaluation.listener import Listener
from vlmdefend.evaluation.machine import environment, peak_memory_mb, reset_peak_memory
from vlmdefend.evaluation.records import Cell, Checks, Cost, Record, Row, Skipped
from vlmdefend.evaluation.store import CellWriter, Shard
from vlmdefend.rng import ImageRng
from vlmdefend.types import Batch, Pipeline, Threat


@dataclass
class Judge:
    """Everything needed to compute a cell."""

    cell: Cell
    model: Pipeline
    defense: Defense
    attack: Attack
    images: ImageSet
    transform: PixelTransform
    device: torch.device
    skip_bad: bool
    width: int = field(init=False)

    def __post_init__(self) -> None:
        self.width = self.cell.batch_size
        self.counted = Counted(self.model)
        self.deployed = self.defense.wrap(self.counted)
        self._attacks = dict.fromkeys(detector_weights(self.cell.attacker, self.defense), self.attack)
        self._fit_cost = Cost()

    def run(self, writer: CellWriter, listener: Listener) -> tuple[Record, list[Row]]:
        """Compute the shards that are missing, then write rows and record."""
        started = datetime.now(UTC).isoformat(timespec="seconds")
        done = writer.finished_shards()
        listener.advance(self.cell, sum(len(s.rows) + len(s.skipped) for s in done))
        shards = list(chunks(len(self.images), self.cell.shard_size))
        if self.attack.learns_from and self.cell.eps > 0 and len(done) < len(shards):
            self._fit()
        for number in range(len(done), len(shards)):
            shard = self._shard_within_memory(number, shards[number].tolist(), listener)
            writer.add(shard)
            done.append(shard)
            listener.advance(self.cell, len(shard.rows) + len(shard.skipped))
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
            gradient_free=self.attack.gradient_free,
            paradigm=self.defense.paradigm,
            environment=environment(self.device),
            started=started,
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        writer.finish(record, rows)
        return record, rows

    def _shard_within_memory(self, number: int, index: list[int], listener: Listener) -> Shard:
        """Halve the batch when memory runs out; the shard is computed anew from its start."""
        while True:
            try:
                return self._shard(number, index)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                if self.width == 1:
                    raise UserError(f"{self.cell.title()}: a single image does not fit into memory.") from None
            self.width //= 2
            listener.note(f"out of memory: the batch is halved to {self.width} images")

    def _fit(self) -> None:
        """Let the attack learn from images spread evenly over the set; a resumed run learns the same again."""
        count = min(self.attack.learns_from, len(self.images))
        index = [i * len(self.images) // count for i in range(count)]
        batch, _ = load_batch(self.images, index, self.transform, skip_bad=self.skip_bad)
        rng = ImageRng(self.cell.seed, batch.ids, "fit")
        before, clock = self._spent(), time.perf_counter()
        images, labels = batch.images.to(self.device), batch.labels.to(self.device)
        threat = Threat(self.cell.norm, self.cell.eps)
        self._attacks = fit(
            self.cell.attacker, self.attack, self.defense, self.counted, images, labels, threat, rng, self.width
        )
        spent = self._spent()
        self._fit_cost = Cost(
            attack_forwards=spent[0] - before[0],
            attack_backwards=spent[1] - before[1],
            attack_seconds=time.perf_counter() - clock,
        )

    def _shard(self, number: int, index: list[int]) -> Shard:
        batch, bad = load_batch(self.images, index, self.transform, skip_bad=self.skip_bad)
        skipped = [Skipped(id=name, reason=reason) for name, reason in bad]
        if not batch.ids:
            return Shard(number, [], skipped, Cost(), Checks())
        batch = Batch(batch.ids, batch.images.to(self.device), batch.labels.to(self.device))
        reset_peak_memory(self.device)
        checks = self._check_pipeline(batch) if number == 0 else Checks()

        before, clock = self._spent(), time.perf_counter()
        clean = self._predict(batch.images, batch.ids)
        seconds = time.perf_counter() - clock
        goal = Goal(batch.labels)
        right = (clean.argmax(dim=1) == batch.labels).nonzero()[:, 0]
        middle, clock = self._spent(), time.perf_counter()
        threat = Threat(self.cell.norm, self.cell.eps)
        adversarial, steps, attack_checks = self._attack(batch, right, threat)
        cost = Cost(
            clean_images=len(batch.ids),
            clean_forwards=middle[0] - before[0],
            clean_backwards=middle[1] - before[1],
            clean_seconds=seconds,
            attack_images=len(right),
            attack_forwards=self._spent()[0] - middle[0],
            attack_backwards=self._spent()[1] - middle[1],
            attack_seconds=time.perf_counter() - clock,
            peak_memory_mb=peak_memory_mb(self.device),
        )
        final = self._predict(adversarial, batch.ids)
        distance = threat.distance(adversarial, batch.images)
        rows = [
            Row(
                id=batch.ids[i],
                label=int(batch.labels[i]),
                clean_prediction=a,
                clean_margin=b,
                adversarial_prediction=c,
                adversarial_margin=d,
                distance=e,
                steps=f,
            )
            for i, (a, b, c, d, e, f) in enumerate(
                zip(
                    clean.argmax(dim=1).tolist(),
                    goal.margin(clean).tolist(),
                    final.argmax(dim=1).tolist(),
                    goal.margin(final).tolist(),
                    distance.tolist(),
                    steps.tolist(),
                    strict=True,
                )
            )
        ]
        cost = cost + self._fit_cost if number == 0 else cost
        return Shard(number, rows, skipped, cost, checks + attack_checks + self._check_survivors(rows, right.tolist()))

    def _attack(self, batch: Batch, right: Tensor, threat: Threat) -> tuple[Tensor, Tensor, Checks]:
        """Attack the images that the deployed pipeline gets right; a result outside the budget counts as clean."""
        adversarial = batch.images.clone()
        steps = torch.zeros(len(batch.ids), dtype=torch.int64)
        if not len(right):
            return adversarial, steps, Checks()
        rng = ImageRng(self.cell.seed, [batch.ids[i] for i in right.tolist()], "attacker")
        crafted = craft(
            self.cell.attacker,
            self._attacks,
            self.defense,
            self.counted,
            batch.images[right],  # a copy, which the attack may overwrite
            batch.labels[right],
            threat,
            rng,
            self.width,
            stop=self._surrogate_agrees(batch),
        )
        if not crafted.finite:
            raise UserError(
                f"{self.cell.title()}: logits were not finite (nan or infinite) on images that the attack "
                "tried, so its failures prove nothing; mend the defense, or raise the model's precision."
            )
        inside = threat.contains(crafted.images, batch.images[right])
        adversarial[right[inside]] = crafted.images[inside]
        steps[right.cpu()] = crafted.steps
        checks = Checks(
            gradient_values=crafted.gradient_values,
            zero_gradients=crafted.zero_gradients,
            outside_budget=crafted.outside + int((~inside).sum()),
        )
        return adversarial, steps, checks

    def _predict(self, images: Tensor, ids: list[str]) -> Tensor:
        """(B, C) logits of the deployed pipeline; clean and adversarial images meet the same random draws."""
        rng = ImageRng(self.cell.seed, ids, "deployed")
        parts = []
        for chunk in chunks(len(ids), self.width):
            with torch.no_grad():
                parts.append(self.deployed(images[chunk], rng.select(chunk)).logits)
        logits = torch.cat(parts)
        if not logits.isfinite().all():
            first = ids[int((~logits.isfinite().all(dim=1)).nonzero()[0, 0])]
            raise UserError(
                f"{self.cell.title()}: the model's logits for image {first!r} are not finite; its weights may be "
                "damaged or its precision too low."
            )
        return logits

    def _surrogate_agrees(self, batch: Batch) -> bool:
        """Whether an adaptive attacker may stop early: only if its stand-in has the deployed pipeline's values."""
        if self.cell.attacker != "adaptive" or self.defense.adaptive_equals_whitebox:
            return True
        images, ids = batch.images[:4], batch.ids[:4]
        spent = self._spent()
        with torch.no_grad():
            stand_in = self.defense.surrogate(self.counted)(images, ImageRng(self.cell.seed, ids, "deployed")).logits
        agrees = torch.allclose(stand_in, self._predict(images, ids), rtol=1e-3, atol=1e-2)
        self.counted.forwards, self.counted.backwards = spent
        return agrees

    def _check_pipeline(self, batch: Batch) -> Checks:
        """Ask the deployed pipeline for a few images again, and one by one."""
        few = min(8, len(batch.ids))
        images, ids = batch.images[:few], batch.ids[:few]
        spent = self._spent()
        first, second = self._predict(images, ids), self._predict(images, ids)
        alone = torch.cat([self._predict(images[i : i + 1], ids[i : i + 1]) for i in range(few)])
        self.counted.forwards, self.counted.backwards = spent
        return Checks(
            forwards_differ=not torch.allclose(first, second, rtol=1e-3, atol=1e-2),
            batch_dependent=not torch.allclose(first, alone, rtol=1e-3, atol=1e-2),
        )

    def _check_survivors(self, rows: list[Row], right: list[int]) -> Checks:
        climbs = self.cell.eps > 0 and not self.attack.blind and not self.attack.learns_from
        survivors = [rows[i] for i in right if rows[i].robust] if climbs else []
        return Checks(
            attacked_survivors=len(survivors),
            loss_not_rising=sum(row.adversarial_margin <= row.clean_margin for row in survivors),
        )

    def _spent(self) -> tuple[int, int]:
        return self.counted.forwards, self.counted.backwards


def _is_out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text or "out of memory" in text
