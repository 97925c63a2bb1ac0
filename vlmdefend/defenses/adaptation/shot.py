"""SHOT: adapts without source images: the head stays fixed, the features train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from vlmdefend.defenses.adaptation import ADAPTATIONS
from vlmdefend.defenses.adaptation.base import (
    Adaptation,
    Domains,
    Role,
    domains_of,
    features_of,
    student_of,
    whole_batch_losses,
    whole_batch_metrics,
)
from vlmdefend.defenses.adaptation.source_only import SourceOnly
from vlmdefend.defenses.training_time.base import Student, Teacher, Terms
from vlmdefend.rng import ImageRng
from vlmdefend.types import Batch


@ADAPTATIONS.register
@dataclass(frozen=True, kw_only=True)
class Shot(Adaptation):
    """A source model with smoothed labels; then, on target images alone, information maximisation and pseudo-labels.

    Liang et al. 2020, eqs. 3 to 7. The head is not trained in the second phase. Class centroids are those of the batch,
    not of the whole set once an epoch: a step then depends on nothing but weights and batch.

    Options:
        smoothing: of the source's labels.
        pseudo: weight of the cross-entropy of the pseudo-labels.
    """

    name: ClassVar[str] = "shot"
    summary: ClassVar[str] = "source-free: information maximisation under a fixed head"
    citation: ClassVar[str] = "Liang et al. 2020"
    role: ClassVar[Role] = "adaptation"
    domains: ClassVar[Domains] = "target"
    smoothing: float = 0.1
    pseudo: float = 0.3

    @property
    def phases(self) -> tuple[Adaptation, ...]:
        """The source stage, then the target stage."""
        return (SourceOnly(smoothing=self.smoothing), self)

    def losses(self, student: Student, teacher: Teacher | None, batch: Batch, rng: ImageRng) -> Terms:
        """Returns the losses of one forward of the target images."""
        trained, target = student_of(student), domains_of(batch).target
        features = features_of(trained(target.images))
        fixed = {name: weight.detach() for name, weight in trained.classifier.head.named_parameters()}
        logits = functional_call(trained.classifier.head, fixed, (features,))
        labels = centroid_labels(features.detach(), logits.detach())
        losses = whole_batch_losses(
            batch, information=-mutual_information(logits), pseudo=self.pseudo * F.cross_entropy(logits, labels)
        )
        agreed = (logits.detach().argmax(dim=1) == labels).float().mean()
        return Terms(losses, whole_batch_metrics(batch, pseudo_agreement=agreed))


def mutual_information(logits: Tensor) -> Tensor:
    """Returns the entropy of the mean prediction minus the mean entropy of the predictions (eq. 3)."""
    log_p = logits.log_softmax(dim=1)
    mean = log_p.exp().mean(dim=0)
    return -(mean * mean.clamp_min(1e-12).log()).sum() + (log_p.exp() * log_p).sum(dim=1).mean()


def centroid_labels(features: Tensor, logits: Tensor) -> Tensor:
    """Returns (B,) the class of the nearest centroid by cosine after two rounds (eqs. 4 to 6); absent classes are left
    out.
    """
    weights = logits.softmax(dim=1)  # (B, C)
    unit = F.normalize(features, dim=1)
    labels = weights.argmax(dim=1)
    for _ in range(2):
        present = torch.bincount(labels, minlength=logits.shape[1]) > 0
        centroids = F.normalize(weights.T @ unit, dim=1)
        labels = (unit @ centroids.T).masked_fill(~present, -torch.inf).argmax(dim=1)
        weights = F.one_hot(labels, logits.shape[1]).to(unit.dtype)
    return labels
