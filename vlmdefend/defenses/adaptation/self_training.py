"""Self-training: confident predictions on weakly changed images label strongly changed ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmdefend.defenses.adaptation import ADAPTATIONS
from vlmdefend.defenses.adaptation._changed import strongly, weakly
from vlmdefend.defenses.adaptation.base import (
    Adaptation,
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
class SelfTraining(Adaptation):
    """Source cross-entropy, and FixMatch's consistency on the target (Sohn et al. 2020, eqs. 3 and 4).

    The labelled images are weakly changed too (eq. 3). Where they are not, labels and pseudo-labels are learnt on
    images of different kinds, and the wrong ones win.

    Options:
        threshold: least probability of a prediction that becomes a label.
        trade_off: weight of the consistency.
    """

    name: ClassVar[str] = "self-training"
    summary: ClassVar[str] = "FixMatch: confident predictions as labels of changed images"
    citation: ClassVar[str] = "Sohn et al. 2020"
    role: ClassVar[Role] = "adaptation"
    additive: ClassVar[bool] = True
    threshold: float = 0.95
    trade_off: float = 1.0

    def losses(self, student: Student, teacher: Teacher | None, batch: Batch, rng: ImageRng) -> Terms:
        """Returns the losses of one forward of the weakly augmented source and of both views of the target."""
        pair = domains_of(batch)
        count, weak = len(pair.source.ids), weakly(batch.images, rng.child("weak"))
        strong = strongly(pair.target.images, rng.select(list(range(count, len(batch.ids)))).child("strong"))
        logits = student_of(student)(torch.cat([weak, strong])).logits
        source, (weak_logits, strong_logits) = logits[:count], logits[count:].chunk(2)
        consistency, used = confident_consistency(weak_logits, strong_logits, self.threshold)
        losses = whole_batch_losses(
            batch, source=F.cross_entropy(source, pair.source.labels), consistency=self.trade_off * consistency
        )
        hits = (source.detach().argmax(dim=1) == pair.source.labels).float().mean()
        return Terms(losses, whole_batch_metrics(batch, source_accuracy=hits, share_used=used))


def confident_consistency(weak: Tensor, strong: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Returns the mean cross-entropy between both views, zero where the weak one is unsure, and the sure share."""
    highest, labels = weak.detach().softmax(dim=1).max(dim=1)
    used = (highest >= threshold).float()
    return (F.cross_entropy(strong, labels, reduction="none") * used).mean(), used.mean()
