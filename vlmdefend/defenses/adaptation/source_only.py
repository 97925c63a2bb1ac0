"""Source only: trains on the labelled source without adaptation, the baseline of every method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F

from vlmdefend.defenses.adaptation import ADAPTATIONS
from vlmdefend.defenses.adaptation.base import (
    Adaptation,
    Domains,
    Role,
    domains_of,
    student_of,
    whole_batch_losses,
    whole_batch_metrics,
)
from vlmdefend.defenses.training_time.base import Student, Teacher, Terms
from vlmdefend.rng import ImageRng
from vlmdefend.types import Batch


@ADAPTATIONS.register
@dataclass(frozen=True, kw_only=True)
class SourceOnly(Adaptation):
    """Cross-entropy on the labelled source; target images are not used (tllib's ERM).

    Options:
        smoothing: of the labels.
    """

    name: ClassVar[str] = "source-only"
    summary: ClassVar[str] = "cross-entropy on the source, no adaptation"
    citation: ClassVar[str] = "–"
    role: ClassVar[Role] = "adaptation"
    domains: ClassVar[Domains] = "source"
    additive: ClassVar[bool] = True
    smoothing: float = 0.0

    def losses(self, student: Student, teacher: Teacher | None, batch: Batch, rng: ImageRng) -> Terms:
        """Returns the mean cross-entropy of the source images."""
        source = domains_of(batch).source
        logits = student_of(student)(source.images).logits
        loss = F.cross_entropy(logits, source.labels, label_smoothing=self.smoothing)
        hits = (logits.detach().argmax(dim=1) == source.labels).float().mean()
        return Terms(whole_batch_losses(batch, source=loss), whole_batch_metrics(batch, source_accuracy=hits))
