"""DAN: aligns the mean embeddings of the features of both domains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F

from vlmdefend.defenses.adaptation import ADAPTATIONS
from vlmdefend.defenses.adaptation._kernels import kernels, mean_discrepancy
from vlmdefend.defenses.adaptation.base import (
    Adaptation,
    Role,
    domains_of,
    features_of,
    split,
    student_of,
    whole_batch_losses,
    whole_batch_metrics,
)
from vlmdefend.defenses.training_time.base import Student, Teacher, Terms
from vlmdefend.rng import ImageRng
from vlmdefend.types import Batch


@ADAPTATIONS.register
@dataclass(frozen=True, kw_only=True)
class Dan(Adaptation):
    """Source cross-entropy, and the maximum mean discrepancy of the bottleneck features (Long et al. 2015, eq. 4).

    Options:
        trade_off: weight of the discrepancy.
    """

    name: ClassVar[str] = "dan"
    summary: ClassVar[str] = "maximum mean discrepancy of the features (MMD)"
    citation: ClassVar[str] = "Long et al. 2015"
    role: ClassVar[Role] = "adaptation"
    trade_off: float = 1.0

    def losses(self, student: Student, teacher: Teacher | None, batch: Batch, rng: ImageRng) -> Terms:
        """Returns the source cross-entropy and the alignment loss, from one forward of both domains."""
        pair = domains_of(batch)
        outputs, count = student_of(student)(batch.images), len(pair.source.ids)
        source, _ = split(outputs, count)
        discrepancy = self.trade_off * mean_discrepancy(kernels(features_of(outputs)), count)
        losses = whole_batch_losses(
            batch, source=F.cross_entropy(source.logits, pair.source.labels), discrepancy=discrepancy
        )
        hits = (source.logits.detach().argmax(dim=1) == pair.source.labels).float().mean()
        return Terms(losses, whole_batch_metrics(batch, source_accuracy=hits))
