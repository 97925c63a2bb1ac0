"""Square attack: random search over square windows; uses logits only, never a gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlmdefend.attacks import ATTACKS
from vlmdefend.attacks.active_set import State, run_active_set
from vlmdefend.attacks.base import Attack
from vlmdefend.attacks.best_iterates import AttackPart
from vlmdefend.attacks.criterion import SURE, Criterion
from vlmdefend.attacks.query._square import grid_of_tiles, patterns, put_square, put_stripes, shift_energy, window_sides
from vlmdefend.attacks.view import View
from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng
from vlmdefend.types import Threat, per_image


@ATTACKS.register
@dataclass(frozen=True, kw_only=True)
class Square(Attack):
    """Random search with shrinking squares, kept where the margin rises (Andriushchenko et al. 2020, section 3).

    L_inf starts from vertical stripes and repaints a square (algorithm 2); L2 starts from a grid of bumps and moves
    the energy of one square to another (algorithm 3).

    Options:
        queries: forwards per image, the start included.
        p_init: the share of the image that the first squares cover.
        rescale: stretch the schedule of the squares' sizes, which is written for 10,000 queries, over ``queries``.

    Raises:
        UserError: queries below 1, p_init outside (0, 1]; images that are not (B, C, H, W), when it attacks.
    """

    name: ClassVar[str] = "square"
    summary: ClassVar[str] = "random search over squares without gradients, 5,000 queries"
    citation: ClassVar[str] = "Andriushchenko et al. 2020"
    gradient_free: ClassVar[bool] = True
    quick: ClassVar[dict[str, Any]] = {"queries": 60}
    queries: int = 5000
    p_init: float = 0.8
    rescale: bool = True

    def __post_init__(self) -> None:
        if self.queries < 1 or not 0 < self.p_init <= 1:
            raise UserError(f"square: queries={self.queries} must be at least 1, p_init={self.p_init} in (0, 1].")

    def budget(self, samples: int = 1) -> tuple[int, int]:
        """Returns ``queries`` forwards."""
        return self.queries * samples, 0

    def perturb(self, view: View, images: Tensor, labels: Tensor, threat: Threat, rng: ImageRng) -> Tensor:
        """Returns the (B, C, H, W) images of highest margin that were queried."""
        if images.dim() != 4:
            raise UserError(f"attack square needs images (B, C, H, W), it was given {tuple(images.shape)}.")
        _, channels, height, width = images.shape
        sides = torch.tensor(window_sides(self.queries, self.p_init, height, width, threat.norm, self.rescale))
        tables = None if threat.norm == "linf" else patterns(sides, height, width, images.device)
        result, criterion = images.clone(), Criterion(labels)
        sides = sides.to(images.device)

        def start(index: Tensor) -> State:
            origin, draws, part = images[index], rng.select(index), threat.select(index)
            begin = put_stripes if threat.norm == "linf" else grid_of_tiles
            # All draws of an image at once, in its own stream: (b, queries, 2 or 4 coordinates, a flip, C signs).
            numbers = draws.child("windows").uniform((self.queries, 5 + channels)).to(images.device)
            return {
                "x": begin(origin, part.radius(origin), draws.child("start")),
                "origin": origin,
                "draws": numbers,
                "margin": torch.full((len(index),), -torch.inf, device=images.device),
                "best": origin.clone(),
                "taken": torch.zeros(len(index), dtype=torch.int64, device=images.device),
            }

        def step(part: AttackPart, index: Tensor, s: State) -> Tensor:
            margin = part.criterion.margin(part.view(s["x"]))
            better = margin > s["margin"]
            torch.where(better, margin, s["margin"], out=s["margin"])
            torch.where(per_image(better, s["x"]), s["x"], s["best"], out=s["best"])
            done = (((margin > SURE) & view.stop) | (s["taken"] + 1 == self.queries)).cpu()
            leaving = done.nonzero()[:, 0]
            if len(leaving):
                result[index[leaving]] = s["best"][leaving]
            numbers = s["draws"][torch.arange(len(index), device=images.device), s["taken"]]
            side, eps = sides[s["taken"]], part.threat.radius(s["x"])
            if tables is None:
                s["x"] = put_square(s["best"], s["origin"], eps, side, numbers)
            else:
                s["x"] = shift_energy(s["best"], s["origin"], eps, side, numbers, tables)
            s["taken"] += 1
            return done

        run_active_set(
            len(images),
            view.width,
            lambda index: AttackPart(view.select(index), criterion.select(index), threat.select(index)),
            start,
            step,
        )
        return result
