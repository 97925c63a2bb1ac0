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

FEW = 8  # images that are predicted again


@dataclass
class DefendedModel:
    """The defended model of one cell, run on ``width`` images at once; the evaluator lowers it when memory runs out."""

    cell: Cell
    model: Pipeline
    defense: Defense

    def __post_init__(self) -> None:
        self.width = self.cell.batch_size
        self.counted = CountingModel(self.model)
        self.pipeline = self.defense.wrap(self.counted)

    def predict(self, images: Tensor, ids: list[str]) -> Outputs:
        """Returns logits, and abstentions, certified radii and detector scores if the defense has them.

        The random draws of an image depend on seed and id only, so they are the same for its clean and adversarial
        version.

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

    def logits(self, images: Tensor, ids: list[str]) -> Tensor:
        """Returns (B, C) logits."""
        return self.predict(images, ids).logits

    def scores(self, outputs: Outputs) -> list[float] | list[None]:
        """Returns the detector's scores if the defense rejects images; else None for each."""
        if not self.defense.rejects or outputs.detector_score is None:
            return [None] * len(outputs.logits)
        scores: list[float] = outputs.detector_score.tolist()
        return scores

    def check(self, batch: Batch) -> Checks:
        """Checks on a few images that predictions repeat, and that they do not depend on the other images.

        For the second check every other image of the batch is replaced by a copy of one. Batch size and position stay
        the same: in another batch size logits differ in the last bits, which a defense that rounds amplifies.
        """
        few = min(FEW, len(batch.ids))
        images, ids = batch.images[:few], batch.ids[:few]
        with self.counted.paused():
            first, second = self.logits(images, ids), self.logits(images, ids)
            some = range(0, few, 2)
            copies = torch.stack([self.logits(images[i].expand_as(images), ids)[i] for i in some])
        return Checks(forwards_differ=not same(first, second), batch_dependent=not same(first[some], copies))

    def not_finite(self) -> UserError:
        """Returns the error for an attack that received logits that are not finite."""
        return UserError(
            f"{self.cell.title()}: logits were not finite (nan or infinite) on images that the attack "
            "tried, so its failures prove nothing; repair the defense, or raise the model's precision."
        )


def same(logits: Tensor, others: Tensor) -> bool:
    """Returns whether two logits are equal up to the rounding differences between batch sizes."""
    return torch.allclose(logits, others, rtol=1e-3, atol=1e-2)
