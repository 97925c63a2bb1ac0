"""The FAB iteration: steps onto the linearised decision boundary, biased to the clean image, with backward steps.

Croce & Hein 2020b, algorithm 1. It looks for the nearest adversarial image; here it stops at the first one inside the
ball where the view allows it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vlmdefend.attacks.active_set import State, run_active_set
from vlmdefend.attacks.best_iterates import AttackPart, BestIterates, update_rows_
from vlmdefend.attacks.criterion import SURE, Criterion
from vlmdefend.attacks.gradient._apgd import start_point
from vlmdefend.attacks.view import View
from vlmdefend.rng import ImageRng
from vlmdefend.types import Norm, Outputs, Threat, per_image


class FabOptions(NamedTuple):
    """Options of one run: number of projections, pull to the clean image, overshoot, backward step."""

    projections: int
    alpha_max: float
    eta: float
    beta: float


class BoundaryPlane(NamedTuple):
    """A linearised decision boundary, ``value + <normal, p - x> = 0``, and the logits at x."""

    value: Tensor  # (B,)
    normal: Tensor  # (B, ...)
    logits: Tensor  # (B, C)


def approach(
    view: View,
    images: Tensor,
    labels: Tensor,
    threat: Threat,
    classes: Tensor,
    steps: FabOptions,
    rng: ImageRng | None,
) -> tuple[Tensor, Tensor]:
    """Runs once towards the nearest boundary between the label and ``classes`` (N, K).

    Args:
        rng: start halfway to a random point of the ball's surface; None: start at the clean image.

    Returns:
        (N, ...) the iterate of highest margin inside the ball (where there is none, the nearest adversarial or the
        last one, projected), and (N,) its margin.
    """
    iterates = BestIterates(images)
    away = Criterion(labels)

    def start(index: Tensor) -> State:
        origin = images[index]
        x = origin.clone()
        if rng is not None:
            x = (origin + 0.5 * (start_point(origin, threat.select(index), rng.select(index)) - origin)).clamp_(0, 1)
        infinite = torch.full((len(index),), torch.inf, device=images.device)
        none = torch.zeros(len(index), dtype=torch.bool, device=images.device)
        return {
            "x": x,
            "origin": origin,
            "best": origin.clone(),  # of highest margin, inside the ball
            "margin": -infinite,
            "near": origin.clone(),  # adversarial, nearest to the clean image, outside the ball
            "distance": infinite,
            "retreated": none,  # x is a backward step from an adversarial iterate
            "expected": none.clone(),  # the projection before was adversarial: x may well be, and needs no gradient
            "taken": none.long(),  # projections
        }

    def step(part: AttackPart, index: Tensor, s: State) -> Tensor:
        logits_only = s["expected"] & ~s["retreated"]
        plane = _boundary_plane(part, s["x"], classes[index], threat.norm, logits_only)
        fooled, margin = part.criterion.reached(plane.logits), part.criterion.margin(plane.logits)
        inside, distance = part.threat.contains(s["x"], s["origin"]), part.threat.distance(s["x"], s["origin"]).float()
        if not view.stochastic:  # there what fooled one draw was only lucky, and the last iterate counts
            update_rows_(s, inside & (margin > s["margin"]), margin=margin, best=s["x"])
            update_rows_(s, ~inside & fooled & (distance < s["distance"]), distance=distance, near=s["x"])
        retreat = fooled & ~s["retreated"]
        back = s["origin"] + (s["x"] - s["origin"]) * steps.beta
        following = torch.where(per_image(retreat, back), back, _onto_boundary(s, plane, steps, threat.norm))
        wait = logits_only & ~fooled  # not adversarial after all: the same point again, with its gradient
        following = torch.where(per_image(wait, s["x"]), s["x"], following)
        s["expected"] = torch.where(s["retreated"], s["expected"], fooled)
        s["taken"] += ~retreat & ~wait
        decided = (margin > SURE) & inside & view.stop
        done = (decided | (s["taken"] == steps.projections)).cpu()
        leaving = done.nonzero()[:, 0]
        if len(leaving):
            iterates.keep_best(index[leaving], s["best"][leaving], s["margin"][leaving])
            rest = (done & ~decided.cpu()).nonzero()[:, 0]
            last = following[rest]
            seen = s["distance"][rest].isfinite() & ~threat.select(index[rest]).contains(last, s["origin"][rest])
            last = torch.where(per_image(seen, last), s["near"][rest], last)
            iterates.keep_last(index[rest], threat.select(index[rest]).project(last, s["origin"][rest]))
        s["x"], s["retreated"] = following, retreat
        return done

    run_active_set(
        len(images),
        view.width,
        lambda index: AttackPart(view.select(index), away.select(index), threat.select(index)),
        start,
        step,
    )
    return iterates.finish(view, away)


def _boundary_plane(part: AttackPart, x: Tensor, classes: Tensor, norm: Norm, logits_only: Tensor) -> BoundaryPlane:
    """Returns the plane at each x; with ``logits_only`` only the logits, with a normal of zero."""
    if not logits_only.any():
        return nearest_plane(part.view, x, part.criterion, classes, norm)
    forward, both = (rows.nonzero()[:, 0] for rows in (logits_only.cpu(), ~logits_only.cpu()))
    seen = part.view.select(forward)(x[forward])
    if not len(both):
        return BoundaryPlane(seen.new_zeros(len(x)), torch.zeros_like(x), seen)
    part_of = nearest_plane(part.view.select(both), x[both], part.criterion.select(both), classes[both], norm)
    value, normal, logits = (found.new_zeros(len(x), *found.shape[1:]) for found in part_of)
    value[both], normal[both], logits[both] = part_of
    logits[forward] = seen
    return BoundaryPlane(value, normal, logits)


def nearest_plane(view: View, x: Tensor, criterion: Criterion, classes: Tensor, norm: Norm) -> BoundaryPlane:
    """Returns the boundary with one of ``classes`` (B, K) that is nearest under linear logits; takes K gradients."""
    found: BoundaryPlane | None = None
    reach = torch.full((len(x),), torch.inf, device=x.device)
    for target in classes.T:
        query = view.gradient(x, Criterion(criterion.labels, target), _difference)
        value, normal = query.loss.nan_to_num(0.0), query.pixels.nan_to_num_(0.0, 0.0, 0.0)
        flat = normal.flatten(1)
        distance = value.abs() / ((flat.abs().sum(1) if norm == "linf" else flat.norm(dim=1)) + 1e-12)
        if found is None:
            found, reach = BoundaryPlane(value, normal, query.logits), distance
        else:
            nearer = distance < reach
            reach = torch.where(nearer, distance, reach)
            kept = torch.where(per_image(nearer, normal), normal, found.normal)
            found = BoundaryPlane(torch.where(nearer, value, found.value), kept, found.logits)
    assert found is not None
    return found


def onto_plane(points: Tensor, normal: Tensor, gap: Tensor, norm: Norm) -> Tensor:
    """Returns the shortest d with ``<normal, d> = gap`` and ``points + d`` in [0, 1]; without a solution, the d that
    comes nearest.

    Each coordinate moves by ``min(t g_i, space_i)`` with g = 1 (L_inf) or |normal| (L2), so the gap that is closed is
    piecewise linear and rising in t: sort its breakpoints, find the piece, solve. In float64.

    Args:
        points: (B, D) in [0, 1].
        normal: (B, D).
        gap: (B,).
    """
    t, w, open_ = points.double(), normal.double(), gap.double()
    direction = w.sign() * open_.sign()[:, None]
    space = torch.where(direction > 0, 1.0 - t, t)
    rate = torch.ones_like(w) if norm == "linf" else w.abs()
    breaks, order = (space / rate.clamp_min(1e-30)).sort(dim=1)
    slope = (w.abs() * rate).gather(1, order)
    spent = (w.abs() * space).gather(1, order).cumsum(1)  # closed by coordinates that have no space left
    left = slope.flip(1).cumsum(1).flip(1)  # slope of those that still have, this one included
    before = torch.cat([torch.zeros_like(spent[:, :1]), spent[:, :-1]], 1)
    closed = before + breaks * left  # at each breakpoint; rises along the row
    piece = torch.searchsorted(closed, open_.abs()[:, None]).clamp_max(w.shape[1] - 1)
    length = (open_.abs()[:, None] - before.gather(1, piece)) / left.gather(1, piece).clamp_min(1e-30)
    return (direction * torch.minimum(length.clamp_min(0.0) * rate, space)).to(points.dtype)


def _onto_boundary(s: State, plane: BoundaryPlane, steps: FabOptions, norm: Norm) -> Tensor:
    """Overshoots the projections of the iterate and of the clean image, and mixes them by their lengths."""
    x, origin, normal = (t.flatten(1) for t in (s["x"], s["origin"], plane.normal))
    ahead = onto_plane(x, normal, -plane.value, norm)
    direct = onto_plane(origin, normal, -plane.value - ((origin - x) * normal).sum(1), norm)
    a, b = (d.abs().amax(1) if norm == "linf" else d.norm(dim=1) for d in (ahead, direct))
    alpha = (a.clamp_min(1e-8) / (a.clamp_min(1e-8) + b.clamp_min(1e-8))).clamp_max(steps.alpha_max)[:, None]
    mixed = (x + steps.eta * ahead) * (1.0 - alpha) + (origin + steps.eta * direct) * alpha
    return mixed.clamp_(0.0, 1.0).view_as(s["x"])


def _difference(outputs: Outputs, criterion: Criterion) -> Tensor:
    """Returns z_target - z_label."""
    assert criterion.targets is not None
    chosen = outputs.logits.gather(1, torch.stack([criterion.targets, criterion.labels], 1))
    return chosen[:, 0] - chosen[:, 1]
