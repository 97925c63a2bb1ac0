"""JAN: aligns the joint mean embeddings of features and predictions of both domains."""

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
class Jan(Adaptation):
    """Source cross-entropy, and the joint discrepancy of features and predictions (Long et al. 2017, eq. 9).

    Options:
        trade_off: weight of the discrepancy.
    """

    name: ClassVar[str] = "jan"
    summary: ClassVar[str] = "joint mean discrepancy of features and predictions"
    citation: ClassVar[str] = "Long et al. 2017"
    role: ClassVar[Role] = "adaptation"
    trade_off: float = 1.0

    def losses(self, student: Student, teacher: Teacher | None, batch: Batch, rng: ImageRng) -> Terms:
        """Returns the source cross-entropy and the alignment loss, from one forward of both domains."""
        pair = domains_of(batch)
        outputs, count = student_of(student)(batch.images), len(pair.source.ids)
        source, _ = split(outputs, count)
        # a product of kernels: the bandwidth of the predictions' one is fixed, as in the authors' code
        joint = kernels(features_of(outputs)) * kernels(outputs.logits.softmax(dim=1), (1.0,), fixed=0.92**2)
        discrepancy = self.trade_off * mean_discrepancy(joint, count)
        losses = whole_batch_losses(
            batch, source=F.cross_entropy(source.logits, pair.source.labels), discrepancy=discrepancy
        )
        hits = (source.logits.detach().argmax(dim=1) == pair.source.labels).float().mean()
        return Terms(losses, whole_batch_metrics(batch, source_accuracy=hits))
