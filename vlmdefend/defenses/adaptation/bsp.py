"""BSP: DANN with a penalty on the largest singular values of the features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
class Bsp(Adaptation):
    """DANN, and a penalty on the largest singular value of either domain's features (Chen et al. 2019, eq. 5, k = 1).

    Options:
        trade_off: weight of the domain loss.
        penalty: weight of the squared singular values.
        warm_up: iterations over which the reversal grows.
    """

    name: ClassVar[str] = "bsp"
    summary: ClassVar[str] = "DANN with batch spectral penalisation"
    citation: ClassVar[str] = "Chen et al. 2019"
    role: ClassVar[Role] = "adaptation"
    trade_off: float = 1.0
    penalty: float = 2e-4
    warm_up: int = 1000

    def auxiliary(self, shape: Shape) -> dict[str, nn.Module]:
        """Returns the domain discriminator, which trains beside the classifier."""
        return {"discriminator": discriminator(shape.features)}

    def losses(self, student: Student, teacher: Teacher | None, batch: Batch, rng: ImageRng) -> Terms:
        """Returns three losses from one forward of both domains."""
        trained, pair = student_of(student), domains_of(batch)
        source, target = split(trained(batch.images), len(pair.source.ids))
        coefficient = reversal_coefficient(trained.iteration, length=self.warm_up)
        network = trained.auxiliary["discriminator"]
        domain = domain_loss(network, features_of(source), features_of(target), coefficient)
        losses = whole_batch_losses(
            batch,
            source=F.cross_entropy(source.logits, pair.source.labels),
            domain=self.trade_off * domain,
            spectrum=self.penalty * spectral_penalty(features_of(source), features_of(target)),
        )
        hits = (source.logits.detach().argmax(dim=1) == pair.source.labels).float().mean()
        return Terms(losses, whole_batch_metrics(batch, source_accuracy=hits, reversal=torch.tensor(coefficient)))


def spectral_penalty(source: Tensor, target: Tensor) -> Tensor:
    """The sum of the squared largest singular values of two (B, D) feature matrices."""
    largest: Tensor = torch.linalg.svdvals(source)[0].square() + torch.linalg.svdvals(target)[0].square()
    return largest
