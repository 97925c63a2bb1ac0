"""The base of attacks that change the class prompts for a whole set of images at once."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from vlmdefend.attacks.base import Attack
from vlmdefend.attacks.best_iterates import check_options
from vlmdefend.attacks.text_level._prompt_scores import PromptScores
from vlmdefend.attacks.text_level._prompts import Mode, Prompts, PromptSearch, groups_of
from vlmdefend.attacks.view import View
from vlmdefend.errors import UserError
from vlmdefend.models.zero_shot.text_side import TextSide
from vlmdefend.types import Threat


@dataclass(frozen=True, kw_only=True)
class TextLevel(Attack):
    """Prompts fitted to images of the set that is evaluated, then used for every image.

    The tokens of the class names and the special ones never change: the task stays the task, and what is attacked is
    the wording around it. A budget of k allows each prompt k changed tokens. The blank prompts of a defense are its
    own and stay as they are.

    A token is chosen as HotFlip does (Ebrahimi et al. 2018): the gradient at the token's embedding says for all of the
    vocabulary at once what the loss would gain to first order; the best ``candidates`` are then tried in full on the
    images' embeddings, and the one is taken that leaves the fewest images right (then: the highest loss), if that is
    better than before. Universal in the sense of Wallace et al. 2019.

    Options of attacks on the prompts:
        mode: ``suffix``: tokens are appended to every prompt; ``substitute``: tokens of the templates are exchanged.
        per_class: each class gets its own tokens, rather than all the same.
        words: only whole lower-case words, so that the prompts can be typed; no: all tokens but the special ones.
        candidates: how many are tried in full for each token.
        beams: how many prompts are carried on at once.
        sweeps: how often, after each new token, the earlier ones are chosen again.
        images: how many images of the set it learns from.

    Raises:
        UserError: a view without a text side that can be reached; prompts without a place for the tokens.
    """

    changes_prompts: ClassVar[bool] = True
    mode: Mode = "suffix"
    per_class: bool = False
    words: bool = True
    candidates: int = 64
    beams: int = 2
    sweeps: int = 1
    images: int = 200
    # What was learned; no option, so it is in no spec and two attacks with the same options are equal.
    learned: Prompts | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_options(self.name, candidates=self.candidates, beams=self.beams, images=self.images)
        if self.sweeps < 0:
            raise UserError(f"{self.name}: sweeps={self.sweeps} must be zero or more.")

    @property
    def learns_from(self) -> int:
        """The option ``images``."""
        return self.images

    @property
    def keeps_best(self) -> bool:
        """False: the same prompts are scored on every image."""
        return False

    def fit_budget(self, count: int, samples: int = 1) -> tuple[int, int]:
        """Returns two forwards per image and draw; more where a defense's embeddings depend on the prompts."""
        return 2 * count * samples, 0

    def conditions(self, side: TextSide | None) -> AbstractContextManager[None]:
        """Returns a context in which the model reads the attacked prompts."""
        if self.learned is None:
            return nullcontext()
        return self._reached(side).using(self.learned.classes)

    def attacked_prompts(self, side: TextSide | None) -> list[str]:
        """Returns C texts, the attacked first template of each class; empty before the fit."""
        if self.learned is None:
            return []
        return [self._reached(side).decode(row) for row in self.learned.tokens[:, 0]]

    def tokens_allowed(self, threat: Threat) -> int:
        """Returns how many tokens of each prompt may change."""
        return int(torch.as_tensor(threat.eps).max())

    def fit(self, view: View, images: Tensor, labels: Tensor, threat: Threat) -> Attack:
        """Returns the attack with the fitted prompts."""
        side = self._reached(view.text_side)
        answers = PromptScores(view, side, images, labels)
        search = PromptSearch(
            side=side,
            answers=answers,
            groups=groups_of(side, self.mode, self.per_class),
            usable=side.usable(words=self.words),
            candidates=self.candidates,
            beams=self.beams,
            sweeps=self.sweeps,
        )
        return self._with(search.run(self.tokens_allowed(threat) if len(answers) else 0))

    def _with(self, learned: Prompts) -> Self:
        fitted = replace(self)
        object.__setattr__(fitted, "learned", learned)
        return fitted

    def _fitted(self) -> Prompts:
        if self.learned is None:
            raise UserError(
                f"attack {self.name} uses the same prompts for all images and has not learned them yet; call fit(view, "
                "images, labels, threat) first and attack with what it returns."
            )
        return self.learned

    def _reached(self, side: TextSide | None) -> TextSide:
        if side is None:
            raise UserError(
                f"attack {self.name} needs a model whose text tower can be reached; use a classifier built by "
                "VisionLanguageModel.zero_shot, as `vlmdefend evaluate` does, or an attack on the images."
            )
        return side
