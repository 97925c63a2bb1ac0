"""PGD: projected gradient ascent from a random start, the best iterate per image, restarts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from vlmdefend.attacks import ATTACKS
from vlmdefend.attacks.active_set import State, run_active_set
from vlmdefend.attacks.base import Attack
from vlmdefend.attacks.criterion import SURE, Criterion
from vlmdefend.attacks.cuda_graph import ReplayedGradient
from vlmdefend.attacks.losses import LOSSES, NEEDS_REFERENCE
from vlmdefend.attacks.target_classes import Target, choose_targets
from vlmdefend.attacks.view import View
from vlmdefend.errors import UserError
from vlmdefend.kernels.l2 import l2_step_
from vlmdefend.kernels.linf import linf_step_
from vlmdefend.rng import ImageRng
from vlmdefend.types import Threat, parse_eps, per_image


class _Part(NamedTuple):
    view: View
    criterion: Criterion
    threat: Threat


@ATTACKS.register
@dataclass(frozen=True, kw_only=True)
class Pgd(Attack):
    """Projected gradient descent (Madry et al. 2018): x <- proj(x + alpha sign(grad)), L2: alpha grad / ||grad||_2.

    Options:
        steps: gradient steps per restart.
        alpha: step size: ``eps/4`` (default; 2.5 eps/steps at 10 steps), ``2.5eps/steps``, or a number as ``1/255``.
        loss: what is raised; see attacks/losses.py.
        restarts: independent random starts, each on the images that the earlier ones did not fool.
        random_start: start uniformly in the ball rather than at the clean image.
        last: score the last iterate, as many papers do, instead of the best of all iterates; every image then gets
            all its steps. Always so against a random pipeline.
        target: a class that the loss aims at: ``random``, ``second`` (most likely wrong class), ``least``, or a class
            index. Another wrong prediction on the way counts too; with ``last`` the target is pursued to the end.
    """

    name: ClassVar[str] = "pgd"
    summary: ClassVar[str] = "projected gradient descent, best iterate per image"
    citation: ClassVar[str] = "Madry et al. 2018"
    steps: int = 10
    alpha: str = "eps/4"
    loss: Literal["ce", "cw", "cw50", "dlr", "kl", "feature", "feature_cos", "co"] = "ce"
    restarts: int = 1
    random_start: bool = True
    last: bool = False
    target: Target | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or self.restarts < 1:
            raise UserError(f"pgd: steps={self.steps} and restarts={self.restarts} must be at least 1.")
        step_size(self.alpha, 1.0, self.steps)
        if self.loss in NEEDS_REFERENCE and self.target is not None:
            raise UserError(f"pgd: loss={self.loss} knows no target class; use loss=ce, cw or dlr with target.")

    @property
    def keeps_best(self) -> bool:
        """False with the option ``last``."""
        return not self.last

    def budget(self, samples: int = 1) -> tuple[int, int]:
        """Returns ``steps`` gradients per restart, and a forward for the last iterate."""
        clean = int(self.target is not None or self.loss in NEEDS_REFERENCE)
        forwards = self.restarts * (self.steps + (not self.last or self.restarts > 1)) + clean
        return forwards * samples, self.restarts * self.steps * samples

    def perturb(self, view: View, images: Tensor, labels: Tensor, threat: Threat, rng: ImageRng) -> Tensor:
        """Runs all restarts, each on the images not fooled so far."""
        criterion = self._criterion(view, images, labels, rng)
        best = images.clone()
        best_margin = torch.full((len(images),), -torch.inf, device=images.device)
        todo = torch.arange(len(images))
        for restart in range(self.restarts):
            draws = rng.child(f"restart {restart}").select(todo)
            part = view.select(todo)
            found, margin = self._climb(part, images[todo], criterion.select(todo), threat.select(todo), draws)
            if self._last(view) and self.restarts > 1:
                margin = Criterion(labels[todo]).margin(part(found))
            better = margin > best_margin[todo] if restart else torch.ones_like(margin, dtype=torch.bool)
            best[todo] = torch.where(per_image(better, found), found, best[todo])
            best_margin[todo] = torch.where(better, margin, best_margin[todo])
            if view.stop:
                todo = (best_margin <= SURE).nonzero()[:, 0].cpu()
            if not len(todo):
                break
        return best

    def _last(self, view: View) -> bool:
        """Returns whether the last iterate is scored: of several random draws the best would only be the luckiest."""
        return self.last or view.stochastic

    def _climb(
        self, view: View, images: Tensor, criterion: Criterion, threat: Threat, rng: ImageRng
    ) -> tuple[Tensor, Tensor]:
        """Runs one start; returns (N, ...) best iterates and (N,) margins (``last``: the last iterates, margin -inf).

        Best, and early leave, are by the margin over the label, whatever class a targeted loss aims at: the verdict
        counts every wrong prediction.
        """
        last, away = self._last(view), Criterion(criterion.labels)
        query_gradient = ReplayedGradient(LOSSES[self.loss], len(images) // view.width * self.steps)
        step_ = linf_step_ if threat.norm == "linf" else l2_step_
        result = torch.empty_like(images)
        margins = torch.full((len(images),), -torch.inf, device=images.device)
        unseen: list[tuple[Tensor, Tensor]] = []  # last iterates, which no gradient query has evaluated

        def start(index: Tensor) -> State:
            origin = images[index]
            x = threat.select(index).random_start(origin, rng.select(index)) if self.random_start else origin.clone()
            state = {"x": x, "origin": origin, "taken": torch.zeros(len(index), dtype=torch.int64)}
            if not last:
                state["best"], state["margin"] = x.clone(), margins[index]
            return state

        def step(part: _Part, index: Tensor, state: State) -> Tensor:
            query = query_gradient(part.view, state["x"], part.criterion)
            fooled = torch.zeros(len(index), dtype=torch.bool)
            if not last:
                margin = away.select(index).margin(query.logits)
                better = margin > state["margin"]
                state["margin"] = torch.where(better, margin, state["margin"])
                torch.where(per_image(better, state["x"]), state["x"], state["best"], out=state["best"])
                if view.stop:
                    fooled = (margin > SURE).cpu()
            eps = part.threat.eps
            step_(state["x"], query.pixels, state["origin"], step_size(self.alpha, eps, self.steps), eps)
            state["taken"] += 1
            done = fooled | (state["taken"] == self.steps)
            leaving = done.nonzero()[:, 0]
            if len(leaving):
                place = index[leaving]
                result[place] = state["x" if last else "best"][leaving]
                if not last:
                    margins[place] = state["margin"][leaving]
                    surviving = (done & ~fooled).nonzero()[:, 0]
                    unseen.append((index[surviving], state["x"][surviving]))
            return done

        run_active_set(
            len(images),
            view.width,
            lambda index: _Part(view.select(index), criterion.select(index), threat.select(index)),
            start,
            step,
        )
        for place, x in unseen:
            if len(place):
                margin = away.select(place).margin(view.select(place)(x))
                better = margin > margins[place]
                result[place] = torch.where(per_image(better, x), x, result[place])
                margins[place] = torch.where(better, margin, margins[place])
        return result, margins

    def _criterion(self, view: View, images: Tensor, labels: Tensor, rng: ImageRng) -> Criterion:
        if self.loss in NEEDS_REFERENCE:
            return Criterion(labels, reference=view.outputs(images))
        if self.target is None:
            return Criterion(labels)
        return Criterion(labels, targets=choose_targets(self.target, view, images, labels, rng))


def step_size(rule: str, eps: float | Tensor, steps: int) -> float | Tensor:
    """Parses ``eps/4``, ``2.5eps/steps``, ``0.1*eps`` or a number such as ``1/255`` into a step in pixel units.

    Raises:
        UserError: not of these forms.
    """
    written = rule.replace(" ", "").lower()
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)?\*?eps(?:/(steps|\d+\.?\d*))?", written)
    divisor = 1.0 if match is None else float(steps) if match[2] == "steps" else float(match[2] or 1)
    if match is not None and divisor > 0:
        return eps * (float(match[1] or 1) / divisor)
    try:
        return parse_eps(written, option="alpha")
    except UserError as error:
        sentence = str(error) if "did you mean" in str(error) else f"alpha {rule!r}: is no step size."
        raise UserError(f"{sentence} Write eps/4, 2.5eps/steps, or a number such as 1/255.") from None
