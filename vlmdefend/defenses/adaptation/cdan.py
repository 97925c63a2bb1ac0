"""CDAN (+E): aligns features conditioned on predictions."""

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
from vlmdefend.types import Batch, Outputs


@ADAPTATIONS.register
@dataclass(frozen=True, kw_only=True)
class Cdan(Adaptation):
    """DANN on the outer product of prediction and features (Long et al. 2018, eqs. 3, 7 and 9).

    The product is taken whole, not through random projections (their eq. 6): with C classes and D features the
    discriminator is C D wide.

    Options:
        entropy: CDAN+E: weigh images by 1 + exp(-entropy of their prediction).
        trade_off: weight of the domain loss.
        warm_up: iterations over which the reversal grows.
    """

    name: ClassVar[str] = "cdan"
    summary: ClassVar[str] = "adversarial alignment of features times prediction"
    citation: ClassVar[str] = "Long et al. 2018"
    role: ClassVar[Role] = "adaptation"
    entropy: bool = True
    trade_off: float = 1.0
    warm_up: int = 1000

    def auxiliary(self, shape: Shape) -> dict[str, nn.Module]:
        """Returns the domain discriminator, which trains beside the classifier."""
        return {"discriminator": discriminator(shape.features * shape.classes)}

    def losses(self, student: Student, teacher: Teacher | None, batch: Batch, rng: ImageRng) -> Terms:
        """Returns the source cross-entropy and the alignment loss, from one forward of both domains."""
        trained, pair = student_of(student), domains_of(batch)
        source, target = split(trained(batch.images), len(pair.source.ids))
        coefficient = reversal_coefficient(trained.iteration, length=self.warm_up)
        weights = (certainty(source.logits), certainty(target.logits)) if self.entropy else None
        network = trained.auxiliary["discriminator"]
        domain = domain_loss(network, conditioned(source), conditioned(target), coefficient, weights)
        losses = whole_batch_losses(
            batch, source=F.cross_entropy(source.logits, pair.source.labels), domain=self.trade_off * domain
        )
        hits = (source.logits.detach().argmax(dim=1) == pair.source.labels).float().mean()
        return Terms(losses, whole_batch_metrics(batch, source_accuracy=hits, reversal=torch.tensor(coefficient)))


def conditioned(outputs: Outputs) -> Tensor:
    """Returns (B, C D) outer products of prediction (without gradient, as the authors do) and features."""
    predicted = outputs.logits.detach().softmax(dim=1)
    return torch.bmm(predicted[:, :, None], features_of(outputs)[:, None, :]).flatten(1)


def certainty(logits: Tensor) -> Tensor:
    """Returns (B,) 1 + exp(-entropy), without gradient, scaled to mean 1 (eq. 9)."""
    log_p = logits.detach().log_softmax(dim=1)
    weights = 1.0 + (log_p.exp() * log_p).sum(dim=1).exp()
    return weights / weights.mean()
