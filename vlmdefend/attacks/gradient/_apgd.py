"""Auto-PGD: a momentum step whose size halves where it stops paying (Croce & Hein 2020, section 3, algorithm 1).

The order of floating point operations is that of the authors' code, so that the iterates are equal to theirs bit for
bit from an equal start.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmdefend.attacks.active_set import State, run_active_set
from vlmdefend.attacks.best_iterates import AttackPart, BestIterates, update_rows_
from vlmdefend.attacks.criterion import SURE, Criterion
from vlmdefend.attacks.cuda_graph import ReplayedGradient
from vlmdefend.attacks.losses import Loss
from vlmdefend.attacks.view import View
from vlmdefend.kernels.apgd import apgd_linf_step_
from vlmdefend.rng import ImageRng
from vlmdefend.types import Threat, per_image

MOMENTUM = 0.75  # weight of the new step; the rest goes to the step before


def checkpoints(steps: int) -> list[int]:
    """Returns the iterations after which the step size is reviewed: 22, 41, 57, 70, 80, 87, 93, 99 for 100."""
    gap, shrink, least = (max(int(share * steps), 1) for share in (0.22, 0.03, 0.06))
    found, at = [], gap
    while at <= steps:
        found.append(at)
        gap = max(gap - shrink, least)
        at += gap
    return found


def start_point(images: Tensor, threat: Threat, rng: ImageRng) -> Tensor:
    """A random point on the ball's surface, clamped to [0, 1]; a uniform cube or normal direction, scaled to eps."""
    shape = images.shape[1:]
    noise = (rng.uniform(shape, -1.0, 1.0) if threat.norm == "linf" else rng.normal(shape)).to(images.device)
    length = noise.flatten(1).abs().amax(1) if threat.norm == "linf" else noise.flatten(1).norm(dim=1)
    return (images + noise / per_image(length + 1e-12, noise) * threat.radius(images)).clamp_(0.0, 1.0)


def climb(
    view: View,
    images: Tensor,
    labels: Tensor,
    threat: Threat,
    rng: ImageRng,
    *,
    loss: Loss,
    steps: int,
    rho: float,
    targets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs one start; returns (N, ...) iterates of best margin (away from the label, targeted or not) and (N,) these
    margins.

    Of a random pipeline the last iterates.
    """
    criterion, away = Criterion(labels, targets), Criterion(labels)
    iterates = BestIterates(images)
    query_gradient = ReplayedGradient(loss, len(images) // view.width * steps)
    at = checkpoints(steps)
    gaps = torch.zeros(steps + 1, dtype=torch.int64, device=images.device)  # iterations a checkpoint looks back on
    gaps[at] = torch.tensor(at, device=images.device).diff(prepend=gaps[:1])

    def start(index: Tensor) -> State:
        origin, part = images[index], threat.select(index)
        x = start_point(origin, part, rng.select(index))
        zero = torch.zeros(len(index), device=images.device)
        count, lowest = zero.long(), torch.full_like(zero, -torch.inf)
        size = 2.0 * torch.as_tensor(part.eps, dtype=x.dtype, device=x.device) + zero
        return {
            "x": x,
            "before": x.clone(),  # the iterate before x
            "origin": origin,
            "top": x.clone(),  # the iterate of highest loss, its gradient and loss
            "top_gradient": torch.zeros_like(x),
            "top_loss": lowest,
            "top_loss_then": lowest.clone(),  # as it was at the last checkpoint
            "loss": zero,  # of the iterate before; 0 before the first, as in the authors' code
            "rises": count,  # iterations since the last checkpoint that raised the loss
            "halved": torch.ones_like(zero, dtype=torch.bool),  # at the last checkpoint
            "size": size,
            "taken": count.clone(),
            "best": x.clone(),  # the iterate of highest margin
            "margin": lowest.clone(),
        }

    def step(part: AttackPart, index: Tensor, s: State) -> Tensor:
        query = query_gradient(part.view, s["x"], part.criterion)
        first = s["taken"] == 0
        margin = away.select(index).margin(query.logits)
        if not view.stochastic:  # there the best draw would only be the luckiest, and the last iterate counts
            update_rows_(s, margin > s["margin"], margin=margin, best=s["x"])
        value = query.loss.float().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        update_rows_(s, (value > s["top_loss"]) | first, top_loss=value, top=s["x"], top_gradient=query.pixels)
        update_rows_(s, first, top_loss_then=value)
        s["rises"] += (value > s["loss"]) & ~first
        update_rows_(s, ~first, loss=value)
        gradient = _review_step_size(s, gaps[s["taken"]], rho, query.pixels)
        weight = 1.0 - (1.0 - MOMENTUM) * (~first).float()
        following = _move(s, gradient, weight, part.threat)
        s["taken"] += 1
        fooled = (margin > SURE) & view.stop
        done = (fooled | (s["taken"] == steps)).cpu()
        leaving = done.nonzero()[:, 0]
        if len(leaving):
            iterates.keep_best(index[leaving], s["best"][leaving], s["margin"][leaving])
            surviving = (done & ~fooled.cpu()).nonzero()[:, 0]
            iterates.keep_last(index[surviving], following[surviving])
        s["before"], s["x"] = s["x"], following
        return done

    run_active_set(
        len(images),
        view.width,
        lambda index: AttackPart(view.select(index), criterion.select(index), threat.select(index)),
        start,
        step,
    )
    return iterates.finish(view, away)


def _review_step_size(s: State, gap: Tensor, rho: float, gradient: Tensor) -> Tensor:
    """At a checkpoint, halves step sizes that no longer raise the loss and returns to the iterate of highest loss.

    It does not pay if fewer than rho of the iterations raised the loss, or if neither it nor the highest loss has
    changed since the last checkpoint (conditions 1 and 2 of the paper).
    """
    checked = gap > 0
    if not checked.any():
        return gradient
    idle = ~s["halved"] & (s["top_loss_then"] >= s["top_loss"])
    halve = checked & ((s["rises"] <= gap * rho) | idle)
    update_rows_(s, checked, halved=halve, top_loss_then=s["top_loss"])
    s["rises"].masked_fill_(checked, 0)
    update_rows_(s, halve, size=s["size"] / 2, x=s["top"])
    return torch.where(per_image(halve, gradient), s["top_gradient"], gradient)


def _move(s: State, gradient: Tensor, weight: Tensor, threat: Threat) -> Tensor:
    """``z = P(x + size g)``, then ``P(x + w (z - x) + (1 - w)(x - before))``; g is the sign or the unit gradient.

    The iterate before and the gradient are spent.
    """
    x, origin = s["x"], s["origin"]
    if threat.norm == "linf":
        return apgd_linf_step_(s["before"], x, gradient, origin, s["size"], weight, threat.eps)
    eps, share = threat.radius(x), per_image(weight, x)
    z = _into_ball((per_image(s["size"], x) * _unit(gradient.nan_to_num(0.0, 0.0, 0.0))).add_(x), origin, eps)
    drift = (x - s["before"]).mul_(1.0 - share)
    return _into_ball(z.sub_(x).mul_(share).add_(x).add_(drift), origin, eps)


def _into_ball(points: Tensor, origin: Tensor, eps: float | Tensor) -> Tensor:
    delta = points.sub_(origin)
    length = per_image(_length(delta), delta)
    return _unit(delta).mul_(length.clamp(max=eps)).add_(origin).clamp_(0.0, 1.0)


def _unit(values: Tensor) -> Tensor:
    return values / per_image(_length(values) + 1e-12, values)


def _length(values: Tensor) -> Tensor:
    return values.square().flatten(1).sum(1).sqrt()
