"""TeCoA: adversarial training against the text features of the class names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vlmdefend.defenses.training_time import OBJECTIVES
from vlmdefend.defenses.training_time._adversarial import Adversarial, accuracy, cross_entropy
from vlmdefend.defenses.training_time.base import Schedule, Student, Teacher, Terms
from vlmdefend.rng import ImageRng
from vlmdefend.types import Batch


@OBJECTIVES.register
@dataclass(frozen=True, kw_only=True)
class Tecoa(Adversarial):
    """Text-guided contrastive adversarial training (Mao et al. 2023, eq. 3).

    The cross-entropy of the class prompts at PGD's images. For a zero-shot classifier this is Madry's adversarial
    training; what is special is that the last layer is text, which stays as it was. Which weights move is the run's
    choice: the image tower, or a visual prompt (``--trains prompt:30``, the border; the tokens behind the patches that
    the authors' code may add to it, ``add_prompt_size``, load with ``--weights`` and are not trained here).

    Published: 10 epochs of SGD, batch 256, PGD-2 at 1/255. The rate is 1e-5, at which others re-ran it: the authors'
    file has 1e-7, and what the released weights were made with is not known.
    """

    name: ClassVar[str] = "tecoa"
    summary: ClassVar[str] = "cross-entropy of the class prompts on adversarial images"
    citation: ClassVar[str] = "Mao et al. 2023"
    schedule: ClassVar[Schedule | None] = Schedule(rate=1e-5, batch_size=256, epochs=10, dataset="imagenet")

    def losses(self, student: Student, teacher: Teacher | None, batch: Batch, rng: ImageRng) -> Terms:
        """Returns the cross-entropy per image."""
        logits = student(self.attacked(student, batch, rng)).logits
        return Terms(
            {"cross_entropy": cross_entropy(logits, batch.labels)},
            {"accuracy_adversarial": accuracy(logits, batch.labels)},
        )
