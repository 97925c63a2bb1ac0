"""MCD: trains two heads whose disagreement on the target is maximised by the heads, minimised by the features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from vlmdefend.defenses.adaptation import ADAPTATIONS
from vlmdefend.defenses.adaptation._reversal import reverse
from vlmdefend.defenses.adaptation.base import (
    Adaptation,
    Role,
    Shape,
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
class Mcd(Adaptation):
    """Maximum classifier discrepancy (Saito et al. 2018, eqs. 8 to 11), in one step by gradient reversal.

    Both heads learn the source; on the target the heads raise their discrepancy and, the gradient reversed below them,
    the features lower it. (The paper alternates three steps, and gives reversal as the other way.) The first head is
    what is deployed.

    Options:
        trade_off: weight of the discrepancy.
        reversal: coefficient of the gradient reversal, from the first step on, as the paper's features answer the heads
            from the first step on; where it grows from zero the heads drift apart unanswered.
    """

    name: ClassVar[str] = "mcd"
    summary: ClassVar[str] = "discrepancy of two heads on the target"
    citation: ClassVar[str] = "Saito et al. 2018"
    role: ClassVar[Role] = "adaptation"
    additive: ClassVar[bool] = True
    trade_off: float = 1.0
    reversal: float = 1.0

    def auxiliary(self, shape: Shape) -> dict[str, nn.Module]:
        """Returns the second head, which trains beside the classifier."""
        return {"second": nn.Linear(shape.features, shape.classes)}

    def losses(self, student: Student, teacher: Teacher | None, batch: Batch, rng: ImageRng) -> Terms:
        """Returns the losses of two heads from one forward of both domains."""
        trained, pair = student_of(student), domains_of(batch)
        source, target = split(trained(batch.images), len(pair.source.ids))
        second, head = trained.auxiliary["second"], trained.classifier.head
        below = reverse(features_of(target), self.reversal)
        supervised = F.cross_entropy(source.logits, pair.source.labels)
        supervised = supervised + F.cross_entropy(second(features_of(source)), pair.source.labels)
        losses = whole_batch_losses(
            batch, source=supervised, discrepancy=-self.trade_off * classifier_discrepancy(head(below), second(below))
        )
        hits = (source.logits.detach().argmax(dim=1) == pair.source.labels).float().mean()
        return Terms(losses, whole_batch_metrics(batch, source_accuracy=hits))


def classifier_discrepancy(first: Tensor, second: Tensor) -> Tensor:
    """The mean absolute difference of two (B, C) predictions (eq. 9)."""
    return (first.softmax(dim=1) - second.softmax(dim=1)).abs().mean()
