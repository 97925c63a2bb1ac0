"""APT: a learned context before the class name, trained on images that are adversarial for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor

from vlmdefend.defenses.training_time import OBJECTIVES
from vlmdefend.defenses.training_time._adversarial import Adversarial, accuracy, cross_entropy
from vlmdefend.defenses.training_time._attack import train_pgd
from vlmdefend.defenses.training_time.base import PromptStudent, Schedule, Student, Teacher, Terms
from vlmdefend.errors import UserError
from vlmdefend.kernels.linf import linf_step_
from vlmdefend.kernels.start import noisy
from vlmdefend.rng import ImageRng
from vlmdefend.types import Batch


@OBJECTIVES.register
@dataclass(frozen=True, kw_only=True)
class Apt(Adversarial):
    """Adversarial prompt tuning (Li et al. 2024).

    The cross-entropy at PGD's images, of which only the context learns: M vectors before the class name, one set for
    all classes (``--trains context:16``, the default) or one for each (``class-context:16``).

    Both towers are frozen, and what robustness the image tower lacks is lacking in the end: the authors start from
    TeCoA's of the same eps. Give such a one: ``--model local-dir:FOLDER`` that ``train --method tecoa`` wrote, or
    ``--weights`` of a published one. On a vanilla CLIP the white-box accuracy stays near zero.

    Published: 16 images of each class (``--limit``: 16 times the classes), batch 32, 50 epochs, the first of them at a
    rate of 1e-5, which is a linear warm-up here; eps 4/255 or 1/255; images cropped and flipped at random (``--augment
    crop-flip``, which ``--profile paper`` takes). Weight decay is 5e-4, the default of their framework, which none of
    their files mentions.

    Options:
        prompting: which prompt the training attack differentiates. ``on-the-fly``: the context as it is.
            ``constant``: the template (``--template``). ``perturbed``: the context ascends with the images, by the
            gradient of the mean loss of the batch, and is then put back.
        prompt_alpha: step size of that ascent. The authors' is an argument without a default: 0.01 is ours.
    """

    name: ClassVar[str] = "apt"
    summary: ClassVar[str] = "a learned context before the class name; give it a robust image tower (tecoa's)"
    citation: ClassVar[str] = "Li et al. 2024"
    learns: ClassVar[tuple[str, ...]] = ("context", "class-context")
    schedule: ClassVar[Schedule | None] = Schedule(
        rate=2e-3,
        weight_decay=5e-4,
        batch_size=32,
        epochs=50,
        warm_up=None,
        dataset="imagenet",
        template="a photo of a {c}",
        trains="context:16",
        augment="crop-flip",
        toy_rate=0.4,
    )
    eps: float = 4 / 255
    steps: int = 3
    alpha: float = 4 / 255 * 2 / 3
    prompting: Literal["on-the-fly", "constant", "perturbed"] = "on-the-fly"
    prompt_alpha: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt_alpha < 0:
            raise UserError(f"apt: prompt_alpha={self.prompt_alpha} must be zero or more.")

    @property
    def whole_batch(self) -> bool:
        """True: one perturbed prompt is shared by all images."""
        return self.prompting == "perturbed"

    def losses(self, student: Student, teacher: Teacher | None, batch: Batch, rng: ImageRng) -> Terms:
        """Returns the cross-entropy per image."""
        logits = student(self._adversarial(cast(PromptStudent, student), batch, rng)).logits
        return Terms(
            {"cross_entropy": cross_entropy(logits, batch.labels)},
            {"accuracy_adversarial": accuracy(logits, batch.labels)},
        )

    def _adversarial(self, student: PromptStudent, batch: Batch, rng: ImageRng) -> Tensor:
        if self.prompting == "on-the-fly":
            return self.attacked(student, batch, rng)
        if self.prompting == "perturbed":
            return self._with_perturbed_prompt(student, batch, rng)
        by_hand = student.hand_features
        return train_pgd(
            lambda pixels: student.attacked(pixels, by_hand),
            batch.images,
            batch.labels,
            rng,
            eps=self.eps,
            steps=self.steps,
            alpha=self.alpha,
        )

    def _with_perturbed_prompt(self, student: PromptStudent, batch: Batch, rng: ImageRng) -> Tensor:
        noise = rng.uniform(batch.images.shape[1:], -1.0, 1.0).to(batch.images.device)
        adversarial, context = noisy(batch.images, noise, self.eps), student.context
        for _ in range(self.steps):
            pixels, vectors = adversarial.requires_grad_(True), context.clone().requires_grad_(True)
            with torch.enable_grad():
                logits = student.attacked(pixels, student.classes_of(vectors))
                total = cross_entropy(logits, batch.labels).sum()
            gradient, ascent = torch.autograd.grad(total, [pixels, vectors])
            context = context + self.prompt_alpha * ascent / len(batch.ids)
            adversarial = linf_step_(pixels.detach(), gradient, batch.images, self.alpha, self.eps)
        return adversarial
