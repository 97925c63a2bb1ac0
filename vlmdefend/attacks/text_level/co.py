"""Attacks image and text together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vlmdefend.attacks import ATTACKS
from vlmdefend.attacks.best_iterates import check_options
from vlmdefend.attacks.criterion import SURE, Criterion
from vlmdefend.attacks.gradient.pgd import Pgd
from vlmdefend.attacks.text_level._text_level import TextLevel
from vlmdefend.attacks.view import View
from vlmdefend.rng import ImageRng
from vlmdefend.types import Threat


@ATTACKS.register
@dataclass(frozen=True, kw_only=True)
class Co(TextLevel):
    """Co-Attack (Zhang et al. 2022): the text first, then each image away from its clean self and the attacked text.

    The image step raises KL(softmax f(x) || softmax f(x')) + 3 CE(z(x'), y), where f are image features, and z the
    logits under the attacked prompts: the paper's objective as its code for classification computes it, by
    projected gradient descent that sees the attacked prompts. In zero-shot classification the text of an image is its
    label's prompt among those of the other classes, so that the distance from it is the cross-entropy.

    What differs from the paper: there each image has a text of its own, and BERT proposes one substitute for it; here
    the prompts are shared, so they are attacked once for the set, with ``tokens`` as the budget, by gradient and
    verified (see :class:`~._text_level.TextLevel`). An image that the prompts alone fool stays clean.
    eps is the radius around the image; at eps 0 nothing is attacked.

    Options as of :class:`~vlmdefend.attacks.text_level._text_level.TextLevel`, and:
        tokens: how many tokens of each prompt may change.
        steps, alpha, restarts, random_start: of the image step, as for ``pgd``.
        loss: ``co`` is the above; ``ce`` and ``cw`` leave the clean image out of it, and need no features.
    """

    name: ClassVar[str] = "co"
    summary: ClassVar[str] = "class prompts first, then each image under them"
    citation: ClassVar[str] = "Zhang et al. 2022"
    tokens: int = 1
    steps: int = 10
    alpha: str = "eps/4"
    restarts: int = 1
    random_start: bool = True
    loss: Literal["co", "ce", "cw"] = "co"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self.name, tokens=self.tokens)
        self._image_step()

    def budget(self, samples: int = 1) -> tuple[int, int]:
        """Returns the budget of pgd, and a forward for the images under the attacked prompts."""
        forwards, backwards = self._image_step().budget(samples)
        return forwards + samples, backwards

    def tokens_allowed(self, threat: Threat) -> int:
        """The option ``tokens``."""
        return self.tokens

    def perturb(self, view: View, images: Tensor, labels: Tensor, threat: Threat, rng: ImageRng) -> Tensor:
        """Takes gradient steps on the images that the attacked prompts alone do not fool."""
        self._fitted()
        result = images.clone()
        with self.conditions(view.text_side):
            todo = torch.arange(len(images))
            if view.stop:
                todo = (Criterion(labels).margin(view(images)) <= SURE).nonzero()[:, 0].cpu()
            if len(todo):
                step = self._image_step()
                result[todo] = step.perturb(
                    view.select(todo), images[todo], labels[todo], threat.select(todo), rng.select(todo)
                )
        return result

    def _image_step(self) -> Pgd:
        return Pgd(
            steps=self.steps, alpha=self.alpha, loss=self.loss, restarts=self.restarts, random_start=self.random_start
        )
