"""The pipeline that is scored: a defense around a model, run in batches that fit into memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmdefend.attacks.view import chunks
from vlmdefend.defenses.base import Defense
from vlmdefend.errors import UserError
from vlmdefend.evaluation.cell.query_count import CountingModel
from vlmdefend.evaluation.store.records import Cell, Checks
from vlmdefend.rng import ImageRng
from vlmdefend.types import Batch, Outputs, Pipeline

FEW = 8  # images that are asked for again


@dataclass
class DefendedModel:
    """The defended model of one cell; ``width`` images go through it at once, fewer once memory ran out."""

    cell: Cell
    model: Pipeline
    defense: Defense

    def __post_init__(self) -> None:
        self.width = self.cell.batch_size
        self.counted = CountingModel(self.model)
        self.pipeline = self.defense.wrap(self.counted)

    def answer(self, images: Tensor, ids: list[str]) -> Outputs:
        """Returns logits, and abstentions, certified radii and detector scores where the defense has them.

        Clean and adversarial images meet the same random draws.

        Raises:
            UserError: logits that are not finite.
        """
        rng = ImageRng(self.cell.seed, ids, "deployed")
        parts = []
        for chunk in chunks(len(ids), self.width):
            with torch.no_grad():
                parts.append(self.pipeline(images[chunk], rng.select(chunk)))
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

    def predict(self, images: Tensor, ids: list[str]) -> Tensor:
        """Returns (B, C) logits."""
        return self.answer(images, ids).logits

    def scores(self, outputs: Outputs) -> list[float] | list[None]:
        """Returns the detector's scores if the defense rejects images; else None for each."""
        if not self.defense.rejects or outputs.detector_score is None:
            return [None] * len(outputs.logits)
        scores: list[float] = outputs.detector_score.tolist()
        return scores

    def check(self, batch: Batch) -> Checks:
        """Predicts a few images twice, and some of them with copies of themselves in place of their mates.

        Batches of one size and an image in its place: alone, it would differ in the last bits, and a defense that
        rounds makes them seen.
        """
        few = min(FEW, len(batch.ids))
        images, ids = batch.images[:few], batch.ids[:few]
        with self.counted.paused():
            first, second = self.predict(images, ids), self.predict(images, ids)
            some = range(0, few, 2)
            apart = torch.stack([self.predict(images[i].expand_as(images), ids)[i] for i in some])
        return Checks(forwards_differ=not same(first, second), batch_dependent=not same(first[some], apart))

    def not_finite(self) -> UserError:
        """Returns the error for an attack that met logits that are not finite."""
        return UserError(
            f"{self.cell.title()}: logits were not finite (nan or infinite) on images that the attack "
            "tried, so its failures prove nothing; mend the defense, or raise the model's precision."
        )


def same(logits: Tensor, others: Tensor) -> bool:
    """Returns whether logits are equal up to the last bits, in which batches of other sizes differ."""
    return torch.allclose(logits, others, rtol=1e-3, atol=1e-2)
