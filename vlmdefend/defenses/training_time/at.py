"""AT: baselines of adversarial and clean fine-tuning with CLIP's own contrastive loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmdefend.defenses.training_time import OBJECTIVES
from vlmdefend.defenses.training_time._adversarial import Adversarial, accuracy
from vlmdefend.defenses.training_time.base import Schedule, StepCost, Student, Teacher, Terms
from vlmdefend.rng import ImageRng
from vlmdefend.types import Batch


@OBJECTIVES.register
@dataclass(frozen=True, kw_only=True)
class At(Adversarial):
    """FT-Adv and FT-Clean, the baselines beside TGA-ZSR (code of Yu et al. 2024).

    Image i is to find the prompt of its class among those of the batch's images, and that prompt is to find image i:
    ``-1/2 log softmax_j l(x_i, t_j) - 1/2 log softmax_j l(x_j, t_i)``, each at j = i. The x are PGD's on the
    cross-entropy of all classes, or the clean images. Two images of one class count as a wrong pair, twice: of 128
    images and 200 classes most batches have many such pairs.

    Adversarial training with the cross-entropy over all classes is ``tecoa``. What TeCoA's authors call standard
    adversarial training (10.6 % robust over 16 sets, from ImageNet; FT-Adv has 28.8 %, from TinyImageNet) is another
    method, as far as is known one without text; it is not here.

    Options:
        images: ``adversarial``: FT-Adv; ``clean``: FT-Clean, which has no attack at all.
        duplicates: ``negative``: wrong pairs, as in the code; ``masked``: pairs of one class are left out of the
            softmax.
    """

    name: ClassVar[str] = "at"
    summary: ClassVar[str] = "baselines FT-Adv and FT-Clean: images and class prompts of a batch find each other"
    citation: ClassVar[str] = "Yu et al. 2024"
    schedule: ClassVar[Schedule | None] = Schedule(rate=1e-4, batch_size=128, epochs=10)
    images: Literal["adversarial", "clean"] = "adversarial"
    duplicates: Literal["negative", "masked"] = "negative"

    @property
    def whole_batch(self) -> bool:
        """True: the loss of an image contrasts it with the others of its batch."""
        return True

    @property
    def attack(self) -> str:
        """Returns the training attack in words; none for FT-Clean."""
        return "none" if self.images == "clean" else super().attack

    @property
    def cost(self) -> StepCost:
        """Returns the passes of one step; FT-Clean has those of the update only."""
        return StepCost(forward_backwards=1 + self.steps * (self.images == "adversarial"), teacher_forwards=0)

    def losses(self, student: Student, teacher: Teacher | None, batch: Batch, rng: ImageRng) -> Terms:
        """Returns the mean of both contrastive directions per image."""
        pixels = batch.images if self.images == "clean" else self.attacked(student, batch, rng)
        logits = student(pixels).logits
        return Terms(
            {"contrast": contrast(logits, batch.labels, masked=self.duplicates == "masked")},
            {f"accuracy_{self.images}": accuracy(logits, batch.labels)},
        )


def contrast(logits: Tensor, labels: Tensor, *, masked: bool) -> Tensor:
    """Returns (B,) cross-entropies of the B image-text pairs, mean of both directions, of (B, C) logits and labels."""
    pairs = logits[:, labels]  # (B, B): image i with the prompt of image j's class
    truth = torch.arange(len(labels), device=labels.device)
    if masked:
        same = (labels[:, None] == labels) & (truth[:, None] != truth)
        pairs = pairs.masked_fill(same, -torch.inf)
    directions = [F.cross_entropy(found, truth, reduction="none") for found in (pairs, pairs.T)]
    return torch.stack(directions).mean(dim=0)
