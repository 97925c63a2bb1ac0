"""RFA: transfers robustness from a robust model's features, without adversarial images."""

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
    teacher_of,
    whole_batch_losses,
    whole_batch_metrics,
)
from vlmdefend.defenses.adaptation.mdd import Mdd, disparity_loss
from vlmdefend.defenses.training_time.base import Student, Teacher, TeacherKind, Terms
from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng
from vlmdefend.types import Batch


@ADAPTATIONS.register
@dataclass(frozen=True, kw_only=True)
class Rfa(Adaptation):
    """MDD, and the similarities within a batch drawn to those of a robust teacher (Awais et al. 2021, eqs. 4 and 5).

    The teacher (``--teacher``) is a robust model, such as one made by ``--robustify vat``; its bottleneck features are
    compared with the student's. (The authors compare four inner layers of ImageNet models; a matrix of similarities
    needs no common width or architecture.) The student should begin from robust weights: ``--init teacher``.

    Options:
        similarity: weight of the similarities.
        margin: of MDD; reversal: its largest coefficient; warm_up: iterations over which it grows.
    """

    name: ClassVar[str] = "rfa"
    summary: ClassVar[str] = "MDD with the similarities of a robust teacher"
    citation: ClassVar[str] = "Awais et al. 2021"
    role: ClassVar[Role] = "robustification"
    teacher: ClassVar[TeacherKind] = "proxy"
    similarity: float = 2000.0
    margin: float = 4.0
    reversal: float = 0.1
    warm_up: int = 1000

    def auxiliary(self, shape: Shape) -> dict[str, nn.Module]:
        """Returns MDD's second head, which trains beside the classifier."""
        return Mdd().auxiliary(shape)

    def losses(self, student: Student, teacher: Teacher | None, batch: Batch, rng: ImageRng) -> Terms:
        """Returns the losses of one forward of both domains through student and teacher."""
        trained, pair = student_of(student), domains_of(batch)
        count, outputs = len(pair.source.ids), trained(batch.images)
        source, target = split(outputs, count)
        coefficient = reversal_coefficient(trained.iteration, self.reversal, self.warm_up)
        second = trained.auxiliary["adversary"](reverse(features_of(outputs), coefficient))
        robust = teacher_of(teacher)(batch.images).features
        if robust is None:
            raise UserError("rfa: this teacher gives no features; give a model with a bottleneck, or a CLIP.")
        losses = whole_batch_losses(
            batch,
            source=F.cross_entropy(source.logits, pair.source.labels),
            disparity=disparity_loss(source.logits, second[:count], target.logits, second[count:], self.margin),
            similarity=self.similarity * similarity_loss(features_of(outputs), robust),
        )
        hits = (source.logits.detach().argmax(dim=1) == pair.source.labels).float().mean()
        return Terms(losses, whole_batch_metrics(batch, source_accuracy=hits, reversal=torch.tensor(coefficient)))


def similarity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Returns the squared Frobenius distance of the Gram matrices of unit rows, over B^2; widths may differ."""
    own, given = (F.normalize(f.flatten(1) @ f.flatten(1).T, dim=1) for f in (student, teacher))
    return (own - given).square().sum() / len(own) ** 2
