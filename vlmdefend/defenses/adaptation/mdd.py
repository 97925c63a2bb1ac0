"""MDD: a second head maximises the margin disparity between target and source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmdefend.defenses.adaptation import ADAPTATIONS
from vlmdefend.defenses.adaptation._reversal import reversal_coefficient, reverse
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
class Mdd(Adaptation):
    """Margin disparity discrepancy (Zhang et al. 2019, eqs. 27 to 30).

    Options:
        margin: exp of the margin: weight of agreement on the source.
        trade_off: weight of the discrepancy.
        reversal: largest coefficient of the gradient reversal (0.1, as in the authors' code).
        warm_up: iterations over which it grows.
    """

    name: ClassVar[str] = "mdd"
    summary: ClassVar[str] = "margin disparity between two heads; the base of the DART release"
    citation: ClassVar[str] = "Zhang et al. 2019"
    role: ClassVar[Role] = "adaptation"
    additive: ClassVar[bool] = True
    margin: float = 4.0
    trade_off: float = 1.0
    reversal: float = 0.1
    warm_up: int = 1000

    def auxiliary(self, shape: Shape) -> dict[str, nn.Module]:
        """Returns the adversarial head, which trains beside the classifier."""
        width = shape.features
        return {"adversary": nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, shape.classes))}

    def losses(self, student: Student, teacher: Teacher | None, batch: Batch, rng: ImageRng) -> Terms:
        """Returns the losses of two heads from one forward of both domains."""
        trained, pair = student_of(student), domains_of(batch)
        outputs, count = trained(batch.images), len(pair.source.ids)
        source, target = split(outputs, count)
        coefficient = reversal_coefficient(trained.iteration, self.reversal, self.warm_up)
        second = trained.auxiliary["adversary"](reverse(features_of(outputs), coefficient))
        disparity = disparity_loss(source.logits, second[:count], target.logits, second[count:], self.margin)
        losses = whole_batch_losses(
            batch, source=F.cross_entropy(source.logits, pair.source.labels), disparity=self.trade_off * disparity
        )
        hits = (source.logits.detach().argmax(dim=1) == pair.source.labels).float().mean()
        return Terms(losses, whole_batch_metrics(batch, source_accuracy=hits, reversal=torch.tensor(coefficient)))


def disparity_loss(
    source: Tensor, second_source: Tensor, target: Tensor, second_target: Tensor, margin: float
) -> Tensor:
    """Returns the second head's loss: margin x disagreement on the source - log(1 - agreement) on the target.

    All (B, C) logits; the classes of the first head are constants here.
    """
    agreed = margin * F.cross_entropy(second_source, source.argmax(dim=1))
    same = second_target.softmax(dim=1).gather(1, target.argmax(dim=1)[:, None])[:, 0]
    return agreed - (1.0 - same).clamp_min(1e-6).log().mean()
