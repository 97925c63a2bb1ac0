"""An attack on the class prompts: a few tokens, the same for the whole set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmdefend.attacks import ATTACKS
from vlmdefend.attacks.text_level._text_level import TextLevel
from vlmdefend.attacks.view import View
from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng
from vlmdefend.types import Norm, Threat


@ATTACKS.register
@dataclass(frozen=True, kw_only=True)
class Text(TextLevel):
    """Up to eps tokens of every class prompt change, the images do not: the wording is part of the attack surface.

    Options as of :class:`~vlmdefend.attacks.text_level._text_level.TextLevel`.

    Raises:
        UserError: an attack before :meth:`fit`, or under a smaller budget than it learned for.
    """

    name: ClassVar[str] = "text"
    summary: ClassVar[str] = "a few tokens of the class prompts, the same for the whole set"
    citation: ClassVar[str] = "Ebrahimi et al. 2018; Wallace et al. 2019"
    norms: ClassVar[tuple[Norm, ...]] = ("tokens",)

    def perturb(self, view: View, images: Tensor, labels: Tensor, threat: Threat, rng: ImageRng) -> Tensor:
        """Returns the images unchanged."""
        spent = max(map(len, self._fitted().changed))
        if spent > int(torch.as_tensor(threat.eps).min()):
            raise UserError(
                f"attack text learned prompts with {spent} changed tokens, and the threat allows an image fewer; the "
                "prompts are the same for all images: fit for the smaller number."
            )
        return images
