"""DANN: trains features from which a discriminator cannot tell the domains apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from vlmdefend.defenses.adaptation import ADAPTATIONS
from vlmdefend.defenses.adaptation._domain import discriminator, domain_loss
from vlmdefend.defenses.adaptation._reversal import reversal_coefficient
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
class Dann(Adaptation):
    """Source cross-entropy, and a domain discriminator whose gradient is reversed (Ganin et al. 2016, eq. 10).

    Options:
        trade_off: weight of the domain loss.
        warm_up: iterations over which the reversal grows.
    """

    name: ClassVar[str] = "dann"
    summary: ClassVar[str] = "adversarial alignment of the features"
    citation: ClassVar[str] = "Ganin et al. 2016"
    role: ClassVar[Role] = "adaptation"
    additive: ClassVar[bool] = True
    trade_off: float = 1.0
    warm_up: int = 1000

    def auxiliary(self, shape: Shape) -> dict[str, nn.Module]:
        """Returns the domain discriminator, which trains beside the classifier."""
        return {"discriminator": discriminator(shape.features)}

    def losses(self, student: Student, teacher: Teacher | None, batch: Batch, rng: ImageRng) -> Terms:
        """Returns the source cross-entropy and the alignment loss, from one forward of both domains."""
        trained, pair = student_of(student), domains_of(batch)
        source, target = split(trained(batch.images), len(pair.source.ids))
        coefficient = reversal_coefficient(trained.iteration, length=self.warm_up)
        domain = domain_loss(trained.auxiliary["discriminator"], features_of(source), features_of(target), coefficient)
        losses = whole_batch_losses(
            batch, source=F.cross_entropy(source.logits, pair.source.labels), domain=self.trade_off * domain
        )
        hits = (source.logits.detach().argmax(dim=1) == pair.source.labels).float().mean()
        return Terms(losses, whole_batch_metrics(batch, source_accuracy=hits, reversal=torch.tensor(coefficient)))
