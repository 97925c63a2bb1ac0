"""Source only: no adaptation, the line that every method must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F

from vlmdefend.defenses.adaptation import ADAPTATIONS
from vlmdefend.defenses.adaptation.base import Adaptation, Domains, Role, domains_of, student_of, told, whole
from vlmdefend.defenses.training_time.base import Student, Teacher, Terms
from vlmdefend.rng import ImageRng
from vlmdefend.types import Batch


@ADAPTATIONS.register
@dataclass(frozen=True, kw_only=True)
class SourceOnly(Adaptation):
    """Cross-entropy on the labelled source; no target image is looked at (tllib's ERM).

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
        """The mean cross-entropy of the source images."""
        source = domains_of(batch).source
        logits = student_of(student)(source.images).logits
        loss = F.cross_entropy(logits, source.labels, label_smoothing=self.smoothing)
        hits = (logits.detach().argmax(dim=1) == source.labels).float().mean()
        return Terms(whole(batch, source=loss), told(batch, source_accuracy=hits))
