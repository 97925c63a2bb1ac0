"""Adam in tanh space with a search for c, image by image (Carlini & Wagner 2017, section VI-A)."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmdefend.attacks.active_set import State, run_active_set
from vlmdefend.attacks.best_iterates import AttackPart, BestIterates, update_rows_
from vlmdefend.attacks.criterion import SURE, Criterion
from vlmdefend.attacks.view import View
from vlmdefend.types import Outputs, Threat, per_image

INSIDE = 1.0 - 1e-6  # pixels at exactly 0 or 1 would lie at infinity in tanh space and never move
BETAS, TINY = (0.9, 0.999), 1e-8  # Adam's
SHARE = 10  # a tenth of a search without a lower objective ends it (the authors' rule), and its last tenth decides on c
PATIENCE, WINDOW = 50, 10  # the fewest steps of the one and of the other; Adam needs some to turn around


def descend(
    view: View,
    images: Tensor,
    criterion: Criterion,
    threat: Threat,
    *,
    steps: int,
    searches: int,
    c: float,
    lr: float,
    kappa: float,
) -> Tensor:
    """Returns the (N, ...) iterate of highest margin inside the ball; where there is none, the nearest adversarial
    image, projected.

    Everything, the end of a search included, is decided by the image itself, so it does not depend on its mates.
    """
    iterates, away = BestIterates(images), Criterion(criterion.labels)
    pause, window = max(steps // SHARE, PATIENCE), max(steps // SHARE, WINDOW)

    def raised(outputs: Outputs, aim: Criterion) -> Tensor:
        return aim.margin(outputs.logits).clamp_max(kappa)

    def start(index: Tensor) -> State:
        origin = images[index]
        zero = torch.zeros(len(index), device=images.device)
        first = into_tanh_space(origin)
        return {
            "w": first.clone(),
            "first": first,
            "mean": torch.zeros_like(first),
            "square": torch.zeros_like(first),
            "origin": origin,
            "taken": zero.long(),  # steps of this search
            "search": zero.long(),
            "c": zero + c,
            "low": zero.clone(),  # the largest c that failed
            "high": zero + torch.inf,  # the smallest c that succeeded
            "success": zero.bool(),  # in the last window
            "lowest": zero + torch.inf,  # objective of this search
            "before": zero + torch.inf,  # the lowest at the last check
            "best": origin.clone(),  # of highest margin, inside the ball
            "margin": zero - torch.inf,
            "near": origin.clone(),  # adversarial, nearest to the clean image
            "distance": zero + torch.inf,
        }

    def step(part: AttackPart, index: Tensor, s: State) -> Tensor:
        x = out_of_tanh_space(s["w"])
        query = part.view.gradient(x, part.criterion, raised)
        margin, won = away.select(index).margin(query.logits), part.criterion.margin(query.logits)
        distance = part.threat.distance(x, s["origin"]).float()
        inside = part.threat.contains(x, s["origin"])
        if not view.stochastic:  # there what fooled one draw was only lucky, and the last iterate counts
            update_rows_(s, inside & (margin > s["margin"]), margin=margin, best=x)
            update_rows_(s, (margin > 0) & (distance < s["distance"]), distance=distance, near=x)
        # Adam's first steps are as long for any c, and overshoot a near boundary: only the last ones decide on c.
        s["success"] &= s["taken"] % window != 0
        s["success"] |= (won > 0) & (won >= kappa)
        s["lowest"] = s["lowest"].minimum(distance.square() - s["c"] * query.loss.float())
        _adam_(s, x, query.pixels, lr)
        s["taken"] += 1
        checked = s["taken"] % pause == 0
        resting = checked & (s["lowest"] >= s["before"])
        update_rows_(s, checked, before=s["lowest"])
        decided = (margin > SURE) & inside & view.stop
        ended = (s["taken"] == steps) | resting
        last = ended & (s["search"] + 1 == searches)
        _next_search_(s, ended & ~last)
        done = (decided | last).cpu()
        leaving = done.nonzero()[:, 0]
        if len(leaving):
            iterates.keep_best(index[leaving], s["best"][leaving], s["margin"][leaving])
            rest = (done & ~decided.cpu()).nonzero()[:, 0]
            found = torch.where(per_image(s["distance"].isfinite(), x), s["near"], out_of_tanh_space(s["w"]))[rest]
            iterates.keep_last(index[rest], threat.select(index[rest]).project(found, s["origin"][rest]))
        return done

    run_active_set(
        len(images),
        view.width,
        lambda index: AttackPart(view.select(index), criterion.select(index), threat.select(index)),
        start,
        step,
    )
    return iterates.finish(view, away)[0]


def into_tanh_space(images: Tensor) -> Tensor:
    """Returns w with ``x = (tanh(w) + 1) / 2``; pixels at 0 or 1 are moved inside by half a millionth."""
    return ((2.0 * images - 1.0) * INSIDE).atanh()


def out_of_tanh_space(w: Tensor) -> Tensor:
    """Returns ``(tanh(w) + 1) / 2``."""
    return (w.tanh() + 1.0) * 0.5


def _adam_(s: State, x: Tensor, raising: Tensor, lr: float) -> None:
    """Takes one step of Adam (Kingma & Ba 2015, algorithm 1) on w, down ``||x - origin||^2 - c loss``."""
    slope = 2.0 * (x - s["origin"]) - per_image(s["c"], x) * raising.nan_to_num_(0.0, 0.0, 0.0)
    slope = slope * (2.0 * x * (1.0 - x))  # dx/dw
    s["mean"].lerp_(slope, 1.0 - BETAS[0])
    s["square"].lerp_(slope.square(), 1.0 - BETAS[1])
    number = s["taken"] + 1
    mean = s["mean"] / per_image(1.0 - BETAS[0] ** number, x)
    square = s["square"] / per_image(1.0 - BETAS[1] ** number, x)
    bound = into_tanh_space(x.new_ones(()))  # beyond it the slope vanishes in float32, for good
    s["w"].sub_(lr * mean / (square.sqrt() + TINY)).clamp_(-bound, bound)


def _next_search_(s: State, where: Tensor) -> None:
    """Chooses the next c from the result of the last one, and restarts from the clean image."""
    high = torch.where(s["success"], s["c"].minimum(s["high"]), s["high"])
    low = torch.where(s["success"], s["low"], s["c"].maximum(s["low"]))
    following = torch.where(high.isfinite(), (low + high) / 2.0, s["c"] * 10.0)
    update_rows_(s, where, high=high, low=low, c=following, w=s["first"])
    for name in ("mean", "square", "taken", "success"):
        s[name].masked_fill_(per_image(where, s[name]), 0)
    for name in ("lowest", "before"):
        s[name].masked_fill_(where, torch.inf)
    s["search"] += where
