"""An adversarial patch: a small square that may hold anything, one for the whole set or one per image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vlmdefend.attacks import ATTACKS
from vlmdefend.attacks.active_set import State, run_active_set
from vlmdefend.attacks.base import Attack
from vlmdefend.attacks.best_iterates import AttackPart, BestIterates, update_rows_
from vlmdefend.attacks.criterion import SURE, Criterion
from vlmdefend.attacks.losses import LOSSES
from vlmdefend.attacks.set_level._patch import Place, corners, cut, paste, resized, window
from vlmdefend.attacks.set_level._set_level import SetLevel, own_stream, radius_of
from vlmdefend.attacks.view import View
from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng
from vlmdefend.types import Norm, Threat, parse_eps, patch_side


@ATTACKS.register
@dataclass(frozen=True, kw_only=True)
class Patch(SetLevel):
    """A square of at most eps of the image's area, of any values in [0, 1] (Brown et al. 2017, section 2).

    Untargeted, and moved but neither turned nor scaled. It is learned by steps along the sign of the gradient, from
    random values.

    Options as of :class:`~vlmdefend.attacks.set_level._set_level.SetLevel`, and:
        learn: ``set`` (default): one patch for all images. ``image``: one per image, the best of its steps; the
            options ``images``, ``batch`` and ``ceiling`` then have no effect.
        place: ``random``: somewhere else on each image, drawn from its own stream; the set's patch is trained at
            places drawn anew at each gradient (EOT over the location). ``center``, or ``corner``: at the lower right.
        alpha: step size in pixel units; of the set's patch the first one's.
        loss: ``cw`` or ``ce``.

    Raises:
        UserError: an attack before :meth:`fit` where learn=set; images that are not (B, C, H, W).
    """

    name: ClassVar[str] = "patch"
    summary: ClassVar[str] = "a square patch, one for the whole set"
    citation: ClassVar[str] = "Brown et al. 2017"
    norms: ClassVar[tuple[Norm, ...]] = ("patch",)
    steps: int = 20
    learn: Literal["set", "image"] = "set"
    place: Place = "random"
    alpha: str = "0.05"
    loss: Literal["ce", "cw"] = "cw"

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_eps(self.alpha, option="patch:alpha")

    @property
    def loss_name(self) -> Literal["ce", "cw", "feature"]:
        """The option ``loss``."""
        return self.loss

    @property
    def learns_from(self) -> int:
        """0 where each image has a patch of its own."""
        return self.images if self.learn == "set" else 0

    @property
    def keeps_best(self) -> bool:
        """True only where each image has a patch of its own."""
        return self.learn == "image"

    def budget(self, samples: int = 1) -> tuple[int, int]:
        """Returns ``steps`` gradients and a forward where each image has a patch of its own; else nothing."""
        return ((self.steps + 1) * samples, self.steps * samples) if self.learn == "image" else (0, 0)

    def fit_budget(self, count: int, samples: int = 1) -> tuple[int, int]:
        """Returns the budget of fitting the set's patch; nothing where each image has its own."""
        return super().fit_budget(count, samples) if self.learn == "set" else (0, 0)

    def fit(self, view: View, images: Tensor, labels: Tensor, threat: Threat) -> Attack:
        """Returns the attack with the fitted patch of the set."""
        if self.learn == "image":
            return self
        _check_shape(images)
        side = patch_side(radius_of(threat), *images.shape[2:])
        patch = own_stream(view, "start").uniform((images.shape[1], side, side))[0].to(images.device)
        alpha, places = parse_eps(self.alpha), view.rng.child("places")

        def apply(at: Tensor, clean: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
            corner = corners(self.place, side, clean, places.select(at))
            return paste(clean, patch, corner), lambda gradient: cut(gradient, corner, side)

        def update(gradient: Tensor, left: float) -> None:
            patch.add_(gradient.sign().to(patch.dtype), alpha=alpha * left).clamp_(0.0, 1.0)

        if side:
            self._fit_passes(view, images, labels, apply, update)
        return self._with(patch)

    def perturb(self, view: View, images: Tensor, labels: Tensor, threat: Threat, rng: ImageRng) -> Tensor:
        """Returns the images with their patches; a fitted patch of another size is resized."""
        _check_shape(images)
        patch = None if self.learn == "image" else self._fitted()
        result, places = images.clone(), rng.child("place")
        eps = torch.as_tensor(threat.eps).cpu().double().expand(len(images))
        sides = [patch_side(share, *images.shape[2:]) for share in eps.tolist()]
        for side in sorted(set(sides)):
            at = torch.tensor([place for place, own in enumerate(sides) if own == side])
            corner = corners(self.place, side, images[at], places.select(at))
            if side and patch is not None:
                result[at] = paste(images[at], resized(patch, side), corner)
            elif side:
                part = AttackPart(view.select(at), Criterion(labels[at]), threat.select(at))
                result[at] = self._climb(part, images[at], corner, side, rng.child("start").select(at))
        return result

    def _climb(self, whole: AttackPart, images: Tensor, corner: Tensor, side: int, rng: ImageRng) -> Tensor:
        """A patch for each of N images; (N, C, H, W) the iterates of highest margin, of a random pipeline the last."""
        view, criterion = whole.view, whole.criterion
        alpha, loss, iterates = parse_eps(self.alpha), LOSSES[self.loss], BestIterates(images)

        def start(index: Tensor) -> State:
            patches = rng.select(index).uniform((images.shape[1], side, side)).to(images.device)
            x = paste(images[index], patches, corner[index])
            return {
                "x": x,
                "free": window(corner[index], side, x),
                "best": x.clone(),
                "margin": torch.full((len(index),), -torch.inf, device=x.device),
                "taken": torch.zeros(len(index), dtype=torch.int64),
            }

        def step(part: AttackPart, index: Tensor, s: State) -> Tensor:
            query = part.view.gradient(s["x"], part.criterion, loss)
            margin = part.criterion.margin(query.logits)
            update_rows_(s, (margin > s["margin"]) | view.stochastic, best=s["x"], margin=margin)
            fooled = ((margin > SURE) & view.stop).cpu()
            s["x"].add_(query.pixels.sign_() * s["free"], alpha=alpha).clamp_(0.0, 1.0)
            s["taken"] += 1
            done = fooled | (s["taken"] == self.steps)
            leaving = done.nonzero()[:, 0]
            if len(leaving):
                iterates.keep_best(index[leaving], s["best"][leaving], s["margin"][leaving])
                surviving = (done & ~fooled).nonzero()[:, 0]
                iterates.keep_last(index[surviving], s["x"][surviving])
            return done

        run_active_set(
            len(images),
            view.width,
            lambda index: AttackPart(view.select(index), criterion.select(index), whole.threat),
            start,
            step,
        )
        if view.stochastic:
            iterates.margins.fill_(-torch.inf)  # the luckiest of several draws is not the best: the last one counts
        return iterates.finish(view, criterion)[0]


def _check_shape(images: Tensor) -> None:
    if images.dim() != 4:
        raise UserError(f"attack patch needs images (B, C, H, W), it was given {tuple(images.shape)}.")
