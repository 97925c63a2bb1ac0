"""The base of the transfer attacks: iterated steps along a momentum; each attack changes how the gradient is taken.

An attack of this family is a component as well: it overrides a hook of :class:`Transfer`, and ``plus`` adds the hooks
of others. They apply in a fixed order, whatever the order in ``plus``: look ahead (ni), scale (si), resize and pad
(di), query, smooth the gradient (ti), add it to the momentum, step.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vlmdefend.attacks import ATTACKS
from vlmdefend.attacks.active_set import State, run_active_set
from vlmdefend.attacks.base import Attack
from vlmdefend.attacks.best_iterates import AttackPart, BestIterates, update_rows_
from vlmdefend.attacks.criterion import SURE, Criterion
from vlmdefend.attacks.gradient.pgd import step_size
from vlmdefend.attacks.losses import LOSSES, NEEDS_REFERENCE
from vlmdefend.attacks.nested import nested_texts
from vlmdefend.attacks.target_classes import Target, choose_targets
from vlmdefend.attacks.view import Gradient, View
from vlmdefend.errors import UserError
from vlmdefend.kernels.l2 import l2_step_
from vlmdefend.kernels.momentum import accumulate_, momentum_linf_step_
from vlmdefend.kernels.operators import Scale
from vlmdefend.registry import parse_spec
from vlmdefend.rng import ImageRng
from vlmdefend.types import Threat


@dataclass(frozen=True, kw_only=True)
class Transfer(Attack):
    """``m <- g / mean|g| + decay m;  x <- proj(x + alpha sign(m))`` from the clean image; L2: ``alpha m / ||m||_2``.

    g is the gradient that the hooks make. The mean in place of the papers' sum gives the same signs, and a look-ahead
    as long as a step; the published codes do so. A gradient that is zero adds nothing.

    The iterate of highest margin counts, and a fooled image leaves, only where every hook queries at the iterate
    itself. Elsewhere the last iterate counts: to fool the model on another image than the result proves nothing. So it
    does under a loss that knows no label, and of a random pipeline.

    Options of every transfer attack:
        steps: gradient steps.
        alpha: step size: ``eps/steps`` (default, Dong et al. 2018), ``eps/4``, or a number as ``1/255``.
        decay: of the momentum; 0 is none.
        loss: what is raised; see attacks/losses.py.
        random_start: start uniformly in the ball; needed by kl, feature and feature_cos, which have no gradient at the
            clean image.
        target: a class that the loss aims at: ``random``, ``second`` (most likely wrong class), ``least``, or a class
            index. Another wrong prediction counts too.
        plus: transfer attacks whose hooks are added: ``ni+di``; with options of their own: ``[ti:kernel=7]+di``.

    Raises:
        UserError: an option out of range; in ``plus`` an attack of another kind, one that is there already, or an
            option that belongs to the whole.
    """

    queries_iterate: ClassVar[bool] = True  # the logits of a query are those of the iterate
    numbers: ClassVar[int] = 0  # uniform draws that :meth:`vary` takes
    steps: int = 10
    alpha: str = "eps/steps"
    decay: float = 1.0
    loss: Literal["ce", "cw", "cw50", "dlr", "kl", "feature", "feature_cos"] = "ce"
    random_start: bool = False
    target: Target | None = None
    plus: str = ""

    def ahead(self, images: Tensor, momentum: Tensor, length: Scale) -> Tensor:
        """Returns the point at which the gradient is taken; ``length`` is decay alpha, a number or one per image."""
        return images

    def scales(self) -> tuple[float, ...]:
        """Returns the factors of the copies of the image whose gradients are averaged."""
        return (1.0,)

    def vary(self, images: Tensor, draws: Tensor) -> Tensor:
        """Returns the (B, ...) differentiable variation given to the model; ``draws`` (B, ``numbers``) are uniform in
        [0, 1).
        """
        return images

    def smooth(self, gradient: Tensor) -> Tensor:
        """Returns the (B, ...) gradient that is added to the momentum."""
        return gradient

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 <= self.decay <= 1:
            raise UserError(f"{self.name}: steps={self.steps} must be at least 1, decay={self.decay} in [0, 1].")
        step_size(self.alpha, 1.0, self.steps)
        if self.loss in NEEDS_REFERENCE and (self.target is not None or not self.random_start):
            raise UserError(
                f"{self.name}: loss={self.loss} has no gradient at the clean image and knows no target class; give "
                "random_start=yes and no target."
            )
        assert self.parts

    @cached_property
    def parts(self) -> tuple[Transfer, ...]:
        """This attack and those of the option ``plus``."""
        parts: list[Transfer] = [self]
        common = {f.name for f in fields(Transfer)}
        for text in nested_texts(self.plus) if self.plus else ():
            name, written = parse_spec(text)
            cls = ATTACKS.get(name)
            if not issubclass(cls, Transfer):
                raise UserError(f"{self.name}: plus={name} is no transfer attack; add mi, ni, di, ti or si.")
            if any(type(part) is cls for part in parts):
                raise UserError(f"{self.name}: plus={self.plus} has {name} twice; once is enough.")
            if misplaced := common & written.keys():
                raise UserError(f"{self.name}: plus={text}: write {misplaced.pop()} outside of plus.")
            made = ATTACKS.create(text)
            assert isinstance(made, Transfer)
            parts.append(made)
        return tuple(parts)

    def budget(self, samples: int = 1) -> tuple[int, int]:
        """Returns a gradient per step and copy, and a forward for the last iterate, a target or the clean outputs."""
        gradients = self.steps * len(self._scales)
        return (gradients + 2) * samples, gradients * samples

    def perturb(self, view: View, images: Tensor, labels: Tensor, threat: Threat, rng: ImageRng) -> Tensor:
        """Returns the (B, ...) best or last iterates."""
        criterion, away, iterates = self._criterion(view, images, labels, rng), Criterion(labels), BestIterates(images)
        last = view.stochastic or self.loss in NEEDS_REFERENCE or not all(part.queries_iterate for part in self.parts)
        draws = (self.steps, len(self._scales), sum(part.numbers for part in self.parts))

        def start(index: Tensor) -> State:
            origin, streams = images[index], rng.select(index)
            x = threat.select(index).random_start(origin, streams) if self.random_start else origin.clone()
            state = {"x": x, "origin": origin, "momentum": torch.zeros_like(x)}
            state["taken"] = torch.zeros(len(index), dtype=torch.int64, device=x.device)
            state["draws"] = streams.child("draws").uniform(draws).to(x.device)
            if not last:
                state |= {"best": x.clone(), "margin": torch.full((len(index),), -torch.inf, device=x.device)}
            return state

        def step(part: AttackPart, index: Tensor, s: State) -> Tensor:
            eps = part.threat.eps
            alpha = step_size(self.alpha, eps, self.steps)
            query = self._query(part, s, alpha)
            leave = torch.zeros_like(s["taken"], dtype=torch.bool)
            if not last:
                margin = away.select(index).margin(query.logits)
                update_rows_(s, margin > s["margin"], margin=margin, best=s["x"])
                leave = (margin > SURE) & view.stop
            if threat.norm == "linf":
                momentum_linf_step_(s["x"], query.pixels, s["momentum"], s["origin"], alpha, eps, self.decay)
            else:
                along = accumulate_(s["momentum"], query.pixels, self.decay).clone()
                l2_step_(s["x"], along, s["origin"], alpha, eps)
            s["taken"] += 1
            done = (leave | (s["taken"] == self.steps)).cpu()
            gone = done.nonzero()[:, 0]
            if len(gone) and last:
                iterates.images[index[gone]] = s["x"][gone]
            elif len(gone):
                iterates.keep_best(index[gone], s["best"][gone], s["margin"][gone])
                unseen = (done & ~leave.cpu()).nonzero()[:, 0]
                iterates.keep_last(index[unseen], s["x"][unseen])
            return done

        run_active_set(
            len(images),
            view.width,
            lambda index: AttackPart(view.select(index), criterion.select(index), threat.select(index)),
            start,
            step,
        )
        return iterates.images if last else iterates.finish(view, away)[0]

    @property
    def _scales(self) -> tuple[float, ...]:
        return max((part.scales() for part in self.parts), key=len)

    def _query(self, part: AttackPart, s: State, alpha: Scale) -> Gradient:
        """The mean gradient over the copies, smoothed; logits and loss are those of the last copy."""
        point = s["x"]
        for member in self.parts:
            point = member.ahead(point, s["momentum"], self.decay * alpha)
        total, copies = None, self._scales
        rows = torch.arange(len(point), device=point.device)
        for copy, scale in enumerate(copies):
            draws = torch.split(s["draws"][rows, s["taken"], copy], [member.numbers for member in self.parts], dim=1)

            def shown(pixels: Tensor, scale: float = scale, draws: tuple[Tensor, ...] = draws) -> Tensor:
                changed = pixels if scale == 1.0 else pixels * scale
                for member, own in zip(self.parts, draws, strict=True):
                    changed = member.vary(changed, own)
                return changed

            query = part.view.gradient(point, part.criterion, LOSSES[self.loss], shown)
            total = query.pixels if total is None else total.add_(query.pixels)
        assert total is not None
        gradient = total.div_(len(copies)) if len(copies) > 1 else total
        for member in self.parts:
            gradient = member.smooth(gradient)
        return query._replace(pixels=gradient)

    def _criterion(self, view: View, images: Tensor, labels: Tensor, rng: ImageRng) -> Criterion:
        if self.loss in NEEDS_REFERENCE:
            return Criterion(labels, reference=view.outputs(images))
        if self.target is None:
            return Criterion(labels)
        return Criterion(labels, choose_targets(self.target, view, images, labels, rng))
