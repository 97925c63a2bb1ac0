"""MCC: minimises the confusion between classes in target predictions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from vlmdefend.defenses.adaptation import ADAPTATIONS
from vlmdefend.defenses.adaptation.base import (
    Adaptation,
    Role,
    domains_of,
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
class Mcc(Adaptation):
    """Source cross-entropy, and minimum class confusion on the target (Jin et al. 2020, eqs. 3 to 9).

    Options:
        temperature: of the target's predictions.
        trade_off: weight of the confusion.
    """

    name: ClassVar[str] = "mcc"
    summary: ClassVar[str] = "minimum class confusion on the target"
    citation: ClassVar[str] = "Jin et al. 2020"
    role: ClassVar[Role] = "adaptation"
    temperature: float = 2.5
    trade_off: float = 1.0

    def losses(self, student: Student, teacher: Teacher | None, batch: Batch, rng: ImageRng) -> Terms:
        """Returns the source cross-entropy and the class confusion of the target, from one forward of both domains."""
        pair = domains_of(batch)
        source, target = split(student_of(student)(batch.images), len(pair.source.ids))
        confusion = self.trade_off * class_confusion(target.logits, self.temperature)
        losses = whole_batch_losses(
            batch, source=F.cross_entropy(source.logits, pair.source.labels), confusion=confusion
        )
        hits = (source.logits.detach().argmax(dim=1) == pair.source.labels).float().mean()
        return Terms(losses, whole_batch_metrics(batch, source_accuracy=hits))


def class_confusion(logits: Tensor, temperature: float) -> Tensor:
    """Returns the off-diagonal mass of the row-normalised class correlation, per class.

    Images weigh 1 + exp(-entropy), scaled to mean 1, without gradient.
    """
    log_p = (logits / temperature).log_softmax(dim=1)
    predicted = log_p.exp()  # (B, C)
    weights = 1.0 + (predicted * log_p).sum(dim=1).exp().detach()
    weights = weights / weights.mean()
    confusion = (predicted * weights[:, None]).T @ predicted  # (C, C)
    confusion = confusion / confusion.sum(dim=1, keepdim=True)
    return (confusion.sum() - confusion.trace()) / logits.shape[1]
