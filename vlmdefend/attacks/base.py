"""The attack contract: an author writes ``perturb``; ``__call__`` holds every attack to its budget."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, final

import torch
from torch import Tensor

from vlmdefend.attacks.criterion import Criterion
from vlmdefend.attacks.view import View
from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng
from vlmdefend.types import Norm, Threat, per_image

if TYPE_CHECKING:
    from vlmdefend.models.zero_shot.text_side import TextSide


class AttackResult(NamedTuple):
    """Adversarial images of B inputs, whether each fooled the view, margins, and gradient queries per image."""

    images: Tensor  # (B, ...) in [0, 1] and inside the ball
    fooled: Tensor  # (B,) bool, as the view sees it
    margin: Tensor  # (B,) best other logit minus the label's, as the view sees it
    steps: Tensor  # (B,) int64, gradient evaluations spent on the image
    outside: int  # images that it, or an attack inside of it, returned outside the budget; projected back


class Attack(ABC):
    """One attack. A subclass is a frozen, keyword-only dataclass: its fields are its configuration and its repr.

    Class attributes: ``name`` (the file's name), ``summary`` and ``citation`` (one line each, for ``list``),
    ``norms`` it is defined for, ``gradient_free`` if it never queries a gradient, ``changes_prompts`` if its findings
    count under other prompts (:meth:`conditions`), ``quick`` options under which the contract tests run it, where its
    default budget is large.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    citation: ClassVar[str]
    norms: ClassVar[tuple[Norm, ...]] = ("linf", "l2")
    gradient_free: ClassVar[bool] = False
    changes_prompts: ClassVar[bool] = False
    quick: ClassVar[dict[str, Any]] = {}

    @abstractmethod
    def perturb(self, view: View, images: Tensor, labels: Tensor, threat: Threat, rng: ImageRng) -> Tensor:
        """Turns (B, ...) images in [0, 1] and (B,) labels into (B, ...) adversarial images; written by the author of an
        attack.

        Any number of images may come; send ``view.width`` of them through the view at a time. ``rng`` holds one
        stream per image for the attack's own draws.
        """

    @property
    def blind(self) -> bool:
        """True: the attack never queries the view, so that transfer, white-box and adaptive attackers are the same."""
        return False

    @property
    def learns_from(self) -> int:
        """Number of images that :meth:`fit` needs; 0: the attack has nothing to fit."""
        return 0

    @property
    def set_level(self) -> bool:
        """True: one perturbation fitted to the whole set is used on every image, which is weaker than an attack per
        image.
        """
        return all(attack.set_level for attack in self.inner) if self.inner else self.learns_from > 0

    def fit(self, view: View, images: Tensor, labels: Tensor, threat: Threat) -> Attack:
        """Returns the attack fitted to a set of images (universal, patch, text); called before any ``__call__``.

        Args:
            view: what the attacker may query, of the ``learns_from`` images of the set.
            images: (N, ...) clean images, right or wrong. Not changed.
            labels: (N,) true classes.
            threat: norm and radius, a number.

        Returns:
            The attack with what it learned; it then treats every image by itself.
        """
        return self

    def conditions(self, side: TextSide | None) -> AbstractContextManager[None]:
        """Returns a context in which results are scored: the clean prompts, unless the attack changes the prompts."""
        return nullcontext()

    def attacked_prompts(self, side: TextSide | None) -> list[str]:
        """Returns one attacked prompt per class for the report; empty if the attack leaves the prompts unchanged."""
        return []

    @property
    def inner(self) -> tuple[Attack, ...]:
        """The attacks that this one runs, if it is made of others."""
        return ()

    @property
    def keeps_best(self) -> bool:
        """False: what ``perturb`` returns is scored, even where the clean image has a higher margin."""
        return True

    def budget(self, samples: int = 1) -> tuple[int, int]:
        """Returns the most forwards and backwards that ``perturb`` spends on one image, for ``--dry-run``."""
        return (0, 0)

    def fit_budget(self, count: int, samples: int = 1) -> tuple[int, int]:
        """Returns the most forwards and backwards that :meth:`fit` spends on ``count`` images in all."""
        spent = [attack.fit_budget(count, samples) for attack in self.inner]
        return sum(forwards for forwards, _ in spent), sum(backwards for _, backwards in spent)

    def spec(self) -> dict[str, Any]:
        """Returns the configuration, as recorded with each result; without anything that was fitted."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init}  # type: ignore[arg-type]

    @final
    def __call__(self, view: View, images: Tensor, labels: Tensor, threat: Threat) -> AttackResult:
        """Attacks the images that the view classifies correctly; checks the input, projects, and keeps the best per
        image.

        Args:
            view: what the attacker may query, with one random stream per image.
            images: (B, ...) float32 in [0, 1]. Not changed.
            labels: (B,) int64 true classes.
            threat: norm and radius.

        Raises:
            UserError: images or labels of another type, shape or range; a norm the attack is not defined for.
        """
        self._check(view, images, labels, threat)
        images, result = images.detach(), images.detach().clone()
        criterion = Criterion(labels)
        if not len(images):
            empty = torch.zeros(0, device=images.device)
            return AttackResult(result, empty.bool(), empty, view.queries.backwards[view._at], 0)
        logits = view(images)
        fooled, margin, before = criterion.reached(logits), criterion.margin(logits), view.queries.outside
        todo = (~fooled).nonzero()[:, 0].cpu() if view.stop else torch.arange(len(images))
        if len(todo) and self._can_move(threat):
            part, clean = view.select(todo), images[todo]
            found = self.perturb(part, clean, labels[todo], threat.select(todo), part.rng.child(self.name)).detach()
            found, outside = _inside(found, clean, threat.select(todo))
            view.queries.outside += outside
            with self.conditions(view.text_side if self.changes_prompts else None):
                logits = part(found)
            found_goal = criterion.select(todo)
            found_margin = found_goal.margin(logits)
            # between two draws of a random pipeline "better" would mean luckier
            keep = self.keeps_best and not view.stochastic
            better = found_margin >= margin[todo] if keep else torch.ones_like(fooled[todo])
            result[todo] = torch.where(per_image(better, found), found, clean)
            margin[todo] = torch.where(better, found_margin, margin[todo])
            fooled[todo] = torch.where(better, found_goal.reached(logits), fooled[todo])
        return AttackResult(result, fooled, margin, view.queries.backwards[view._at], view.queries.outside - before)

    def _can_move(self, threat: Threat) -> bool:
        return bool((torch.as_tensor(threat.eps) > 0).any())

    def _check(self, view: View, images: Tensor, labels: Tensor, threat: Threat) -> None:
        if threat.norm not in self.norms:
            raise UserError(f"attack {self.name} is defined for {', '.join(self.norms)}, not for {threat.norm}.")
        if images.is_inference() or labels.is_inference():
            raise UserError(
                "the images were made under torch.inference_mode(); an attack needs gradients: make them outside it."
            )
        if images.dtype != torch.float32 or images.dim() < 2:
            raise UserError(
                f"an attack takes float32 images (B, ...), it was given {images.dtype} {tuple(images.shape)}; low "
                "precision breaks the budget."
            )
        if labels.shape != images.shape[:1] or labels.dtype != torch.int64 or len(view) != len(images):
            raise UserError(
                f"{len(images)} images need {len(images)} int64 labels and random streams; given were labels "
                f"{labels.dtype} {tuple(labels.shape)} and a view of {len(view)}."
            )
        if len(images) and not (images.isfinite().all() and images.min() >= 0 and images.max() <= 1):
            raise UserError("an attack takes images in [0, 1]; normalisation belongs inside the model.")
        if view.num_classes < 2:
            raise UserError("there is nothing to attack with a single class; give at least two class names.")
        if len(labels) and (labels.min() < 0 or labels.max() >= view.num_classes):
            raise UserError(
                f"labels reach {int(labels.max())}, the model knows {view.num_classes} classes (0 to "
                f"{view.num_classes - 1})."
            )


def _inside(found: Tensor, clean: Tensor, threat: Threat) -> tuple[Tensor, int]:
    """Returns images inside the budget unchanged, to the bit; projects the others, and replaces not-a-number by the
    clean pixel.
    """
    contained = threat.contains(found, clean)
    outside = int((~contained).sum())
    if outside:
        repaired = threat.project(torch.where(found.isfinite(), found, clean), clean)
        found = torch.where(per_image(contained, found), found, repaired)
    return found, outside


def __getattr__(name: str) -> Any:
    """Names of version 0.1."""
    from vlmdefend.moved import old_member

    return old_member(__name__, name)
