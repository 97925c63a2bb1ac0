"""The verdict on one cell: shard by shard, attack what is right, re-predict, re-measure, trust nobody."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import TypeVar

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
from vlmdefend.evaluation.attackers import Crafted, craft, fit, variants
from vlmdefend.evaluation.counting import Counted
from vlmdefend.evaluation.listener import Listener
from vlmdefend.evaluation.machine import environment, peak_memory_mb, reset_peak_memory
from vlmdefend.evaluation.records import Cell, Checks, Cost, Record, Row, Skipped
from vlmdefend.evaluation.store import CellWriter, Shard
from vlmdefend.models.text_side import TextSide
from vlmdefend.rng import ImageRng
from vlmdefend.types import Batch, Outputs, Pipeline, Threat

Result = TypeVar("Result")


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
    keep: Callable[[int, Tensor], None] | None = None  # is given each shard's images before it counts as done
    width: int = field(init=False)

    def __post_init__(self) -> None:
        self.width = self.cell.batch_size
        self.counted = Counted(self.model)
        self.deployed = self.defense.wrap(self.counted)
        self._attacks = dict.fromkeys(variants(self.cell.attacker, self.defense), self.attack)
        self._fit_cost, self._fit_checks = Cost(), Checks()

    def run(self, writer: CellWriter, listener: Listener) -> tuple[Record, list[Row]]:
        """Compute the shards that are missing, then write rows and record."""
        started = datetime.now(UTC).isoformat(timespec="seconds")
        done = writer.finished_shards()
        listener.advance(self.cell, sum(len(s.rows) + len(s.skipped) for s in done))
        shards = list(chunks(len(self.images), self.cell.shard_size))
        # prompts are needed for the record too, and no shard holds them
        if self.attack.learns_from and self.cell.eps > 0 and (len(done) < len(shards) or self.attack.changes_prompts):
            self._within_memory(self._fit, listener)
        for number in range(len(done), len(shards)):
            shard = self._within_memory(partial(self._shard, number, shards[number].tolist()), listener)
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
            blind=self.attack.blind,
            gradient_free=self.attack.gradient_free,
            set_level=self.attack.set_level,
            attacked_prompts=self._learned().attacked_prompts(self._text_side()),
            paradigm=self.defense.paradigm,
            environment=environment(self.device),
            started=started,
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        writer.finish(record, rows)
        return record, rows

    def _within_memory(self, compute: Callable[[], Result], listener: Listener) -> Result:
        """Halve the batch when memory runs out; the shard, or the lesson, is computed anew from its start."""
        while True:
            try:
                return compute()
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
        reset_peak_memory(self.device)
        before, clock = self._spent(), time.perf_counter()
        images, labels = batch.images.to(self.device), batch.labels.to(self.device)
        threat = Threat(self.cell.norm, self.cell.eps)
        fitted = fit(
            self.cell.attacker, self.attack, self.defense, self.counted, images, labels, threat, rng, self.width
        )
        if not fitted.finite:
            raise self._not_finite()
        self._attacks = fitted.attacks
        self._fit_checks = Checks(gradient_values=fitted.gradient_values, zero_gradients=fitted.zero_gradients)
        spent = self._spent()
        self._fit_cost = Cost(
            attack_forwards=spent[0] - before[0],
            attack_backwards=spent[1] - before[1],
            attack_seconds=time.perf_counter() - clock,
            peak_memory_mb=peak_memory_mb(self.device),
        )

    def _shard(self, number: int, index: list[int]) -> Shard:
        batch, bad = load_batch(self.images, index, self.transform, skip_bad=self.skip_bad)
        skipped = [Skipped(id=name, reason=reason) for name, reason in bad]
        if not batch.ids:
            return Shard(number, [], skipped, Cost(), Checks())
        batch = Batch(batch.ids, batch.images.to(self.device), batch.labels.to(self.device))
        reset_peak_memory(self.device)
        checks = self._check_pipeline(batch) + self._fit_checks if number == 0 else Checks()

        before, clock = self._spent(), time.perf_counter()
        clean = self.answer(batch.images, batch.ids)
        seconds = time.perf_counter() - clock
        goal = Goal(batch.labels)
        right = (clean.predictions == batch.labels).nonzero()[:, 0]
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
        with self._learned().conditions(self._text_side()):
            final = self.answer(adversarial, batch.ids)
        distance = threat.distance(adversarial, batch.images)
        radius = [None] * len(batch.ids) if clean.certified_radius is None else clean.certified_radius.tolist()
        clean_score, final_score = self._scores(clean), self._scores(final)
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
                certified_radius=g,
                clean_score=clean_score[i],
                adversarial_score=final_score[i],
            )
            for i, (a, b, c, d, e, f, g) in enumerate(
                zip(
                    clean.predictions.tolist(),
                    goal.margin(clean.logits).tolist(),
                    final.predictions.tolist(),
                    goal.margin(final.logits).tolist(),
                    distance.tolist(),
                    steps.tolist(),
                    radius,
                    strict=True,
                )
            )
        ]
        if self.keep is not None:
            self.keep(number, adversarial)
        cost = cost + self._fit_cost if number == 0 else cost
        return Shard(number, rows, skipped, cost, checks + attack_checks + self._check_survivors(rows, right.tolist()))

    def _attack(self, batch: Batch, right: Tensor, threat: Threat) -> tuple[Tensor, Tensor, Checks]:
        """Attack the images that the deployed pipeline gets right; a result outside the budget counts as clean."""
        adversarial = batch.images.clone()
        steps = torch.zeros(len(batch.ids), dtype=torch.int64)
        if not len(right):
            return adversarial, steps, Checks()
        rng = ImageRng(self.cell.seed, [batch.ids[i] for i in right.tolist()], "attacker")

        def attempt(at: Tensor, *, stop: bool) -> Crafted:
            return craft(
                self.cell.attacker,
                self._attacks,
                self.defense,
                self.counted,
                batch.images[right[at]],  # a copy, which the attack may overwrite
                batch.labels[right[at]],
                threat,
                rng.select(at),
                self.width,
                stop=stop,
            )

        stop = self._surrogate_agrees(batch)
        crafted = attempt(torch.arange(len(right)), stop=stop)
        if stop and self._has_stand_in() and crafted.finite:
            spared = self._spared(crafted, batch.labels[right], rng.ids)
            crafted = crafted.with_again(spared, attempt(spared, stop=False)) if len(spared) else crafted
        if not crafted.finite:
            raise self._not_finite()
        inside = threat.contains(crafted.images, batch.images[right])
        adversarial[right[inside]] = crafted.images[inside]
        steps[right.cpu()] = crafted.steps
        checks = Checks(
            gradient_values=crafted.gradient_values,
            zero_gradients=crafted.zero_gradients,
            outside_budget=crafted.outside + int((~inside).sum()),
        )
        return adversarial, steps, checks

    def _learned(self) -> Attack:
        """The attack that may have changed the prompts: one for all variants."""
        return next(iter(self._attacks.values()))

    def _text_side(self) -> TextSide | None:
        """The model's prompts, where the attack changes them."""
        return getattr(self.model, "text_side", None) if self.attack.changes_prompts else None

    def _not_finite(self) -> UserError:
        return UserError(
            f"{self.cell.title()}: logits were not finite (nan or infinite) on images that the attack "
            "tried, so its failures prove nothing; mend the defense, or raise the model's precision."
        )

    def predict(self, images: Tensor, ids: list[str]) -> Tensor:
        """(B, C) logits of the deployed pipeline; clean and adversarial images meet the same random draws."""
        return self.answer(images, ids).logits

    def answer(self, images: Tensor, ids: list[str]) -> Outputs:
        """What the deployed pipeline says: logits, and where it abstains or certifies, that too."""
        rng = ImageRng(self.cell.seed, ids, "deployed")
        parts = []
        for chunk in chunks(len(ids), self.width):
            with torch.no_grad():
                parts.append(self.deployed(images[chunk], rng.select(chunk)))
        logits = torch.cat([part.logits for part in parts])
        if not logits.isfinite().all():
            first = ids[int((~logits.isfinite().all(dim=1)).nonzero()[0, 0])]
            raise UserError(
                f"{self.cell.title()}: the model's logits for image {first!r} are not finite; its weights may be "
                "damaged or its precision too low."
            )
        abstained = [part.abstained for part in parts if part.abstained is not None]
        radius = [part.certified_radius for part in parts if part.certified_radius is not None]
        scores = [part.detector_score for part in parts if part.detector_score is not None]
        return Outputs(
            logits,
            detector_score=torch.cat(scores) if scores else None,
            abstained=torch.cat(abstained) if abstained else None,
            certified_radius=torch.cat(radius) if radius else None,
        )

    def _scores(self, outputs: Outputs) -> list[float] | list[None]:
        """The detector's scores, where the defense may turn images away; a score that only steers it is its own."""
        if not self.defense.rejects or outputs.detector_score is None:
            return [None] * len(outputs.logits)
        scores: list[float] = outputs.detector_score.tolist()
        return scores

    def _surrogate_agrees(self, batch: Batch) -> bool:
        """Whether an adaptive attacker may stop early: only if its stand-ins have the deployed pipeline's values.

        Asked of clean images; what they say of the others is judged after the attack (:meth:`_spared`).
        """
        if not self._has_stand_in():
            return True
        images, ids = batch.images[:4], batch.ids[:4]
        spent = self._spent()
        with torch.no_grad():
            deployed = self.predict(images, ids)
            agrees = all(
                torch.allclose(
                    surrogate(images, ImageRng(self.cell.seed, ids, "deployed")).logits, deployed, rtol=1e-3, atol=1e-2
                )
                for surrogate in self.defense.surrogates(self.counted)
            )
        self.counted.forwards, self.counted.backwards = spent
        return agrees

    def _has_stand_in(self) -> bool:
        return self.cell.attacker == "adaptive" and not self.defense.adaptive_equals_whitebox

    def _spared(self, crafted: Crafted, labels: Tensor, ids: list[str]) -> Tensor:
        """(n,) images that a stand-in calls fooled, so that they left early, and the deployed pipeline gets right."""
        if self.defense.stochastic:
            return torch.empty(0, dtype=torch.int64)  # there none leaves early
        spent = self._spent()
        with self._learned().conditions(self._text_side()):
            right = self.answer(crafted.images, ids).predictions == labels
        self.counted.forwards, self.counted.backwards = spent
        return (crafted.fooled & right).nonzero()[:, 0].cpu()

    def _check_pipeline(self, batch: Batch) -> Checks:
        """Ask the deployed pipeline for a few images again, and one by one."""
        few = min(8, len(batch.ids))
        images, ids = batch.images[:few], batch.ids[:few]
        spent = self._spent()
        first, second = self.predict(images, ids), self.predict(images, ids)
        alone = torch.cat([self.predict(images[i : i + 1], ids[i : i + 1]) for i in range(few)])
        self.counted.forwards, self.counted.backwards = spent
        return Checks(
            forwards_differ=not torch.allclose(first, second, rtol=1e-3, atol=1e-2),
            batch_dependent=not torch.allclose(first, alone, rtol=1e-3, atol=1e-2),
        )

    def _check_survivors(self, rows: list[Row], right: list[int]) -> Checks:
        climbs = self.cell.eps > 0 and not self.attack.blind and not self.attack.set_level
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
