"""Augmented views of test-time methods: the image and random resized crops of it, for a whole batch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vlmdefend.defenses.views.augmix import DRAWS, augmix
from vlmdefend.defenses.views.resample import Span, axis_weights, resample, whole
from vlmdefend.rng import ImageRng
from vlmdefend.types import Outputs, Pipeline, per_image

ATTEMPTS = 10  # at a box that fits, as torchvision
AT_ONCE = 256  # views in the model at once


def augmented_views(
    images: Tensor,
    rng: ImageRng,
    count: int,
    *,
    area: tuple[float, float] = (0.08, 1.0),
    flip: bool = True,
    mixed: bool = False,
) -> Tensor:
    """Returns (B, count, 3, H, W): the image itself, then ``count - 1`` random crops of it.

    The view set of TPT (Shu et al. 2022) and R-TPT (Sheng et al. 2025): RandomResizedCrop with torchvision's defaults
    (share of the area uniform in ``area``, log-uniform aspect ratio in 3/4 to 4/3, bilinear), then a horizontal flip
    with probability 1/2, then AugMix where ``mixed``, as their codes have it for fine-grained sets. The crops are of
    the image that the pipeline is given, not of the original file, and are not rounded to 8 bits. All sizes are shares
    of the image's, so nothing has to be scaled.
    """
    if count == 1:
        return images[:, None]
    height, width = images.shape[-2:]
    draws = rng.uniform((count - 1, 2 * ATTEMPTS + 3)).to(images.device)
    down, across = _boxes(draws, height, width, area)
    rows = axis_weights(height, down, whole(height, down.first))  # (B, count - 1, H, H)
    columns = axis_weights(width, across, whole(width, across.first))
    if flip:
        columns = torch.where(draws[..., -1, None, None] < 0.5, columns.flip(-2), columns)
    crops = resample(images[:, None], rows, columns)
    if mixed:
        chains = rng.uniform((count - 1, DRAWS))
        crops = augmix(crops.flatten(0, 1), chains.flatten(0, 1)).view_as(crops)
    return torch.cat([images[:, None], crops], dim=1)


def predict_views(model: Pipeline, views: Tensor, rng: ImageRng) -> Outputs:
    """Predicts (B, V, 3, H, W) views, ``AT_ONCE`` at a time: logits (B, V, C), features (B, V, D), scores (B, V)."""
    owners = torch.arange(len(views)).repeat_interleave(views.shape[1])
    flat = views.flatten(0, 1)
    parts = [
        model(flat[first : first + AT_ONCE], rng.select(owners[first : first + AT_ONCE]))
        for first in range(0, len(flat), AT_ONCE)
    ]
    return by_view(parts, views.shape[:2])


def by_view(parts: Sequence[Outputs], shape: Sequence[int]) -> Outputs:
    """Joins outputs of B V images into logits (B, V, C), features (B, V, D) and scores (B, V)."""

    def split(flat: Tensor) -> Tensor:
        return flat.view(*shape, *flat.shape[1:])

    def whole(values: list[Tensor | None]) -> Tensor | None:
        known = [value for value in values if value is not None]
        return split(torch.cat(known)) if len(known) == len(values) else None

    logits = split(torch.cat([part.logits for part in parts]))
    return Outputs(logits, whole([part.features for part in parts]), whole([part.detector_score for part in parts]))


def mean_score(views: Outputs) -> Tensor | None:
    """Returns (B,): the mean over the views of a detector's score behind them, for an attacker who has to lower it."""
    return None if views.detector_score is None else views.detector_score.mean(dim=1)


def entropy(logits: Tensor) -> Tensor:
    """Returns the (...) entropy of the softmax of (..., C) logits, in nats."""
    log_probabilities = logits.log_softmax(dim=-1)
    return -(log_probabilities.exp() * log_probabilities).sum(dim=-1)


def marginal_entropy(logits: Tensor) -> Tensor:
    """Returns the (...) entropy of the mean probabilities of V views, of (..., V, C) logits, in nats."""
    log_mean = logits.log_softmax(dim=-1).logsumexp(dim=-2) - math.log(logits.shape[-2])
    return -(log_mean.exp() * log_mean).sum(dim=-1)


def most_confident(logits: Tensor, share: float) -> Tensor:
    """Returns (B, k) indices of the views of lowest entropy, k = int(share V) but at least one."""
    keep = max(1, int(share * logits.shape[1]))
    return entropy(logits.detach()).topk(keep, dim=1, largest=False).indices


def pick(values: Tensor, index: Tensor) -> Tensor:
    """Selects (B, k) of V views: (B, V, ...) to (B, k, ...)."""
    return values[per_image(torch.arange(len(index), device=index.device), index), index]


def _boxes(draws: Tensor, height: int, width: int, area: tuple[float, float]) -> tuple[Span, Span]:
    """Turns (B, V, 2 ATTEMPTS + 3) uniform draws into boxes: the first attempt that fits, else the middle."""
    shares, ratios = draws[..., :ATTEMPTS], draws[..., ATTEMPTS : 2 * ATTEMPTS]
    pixels = height * width * (area[0] + (area[1] - area[0]) * shares)
    limit = math.log(4 / 3)
    ratio = (limit * (2 * ratios - 1)).exp()
    across, down = (pixels * ratio).sqrt().round(), (pixels / ratio).sqrt().round()
    fits = (across >= 1) & (across <= width) & (down >= 1) & (down <= height)
    first = fits.int().argmax(dim=-1, keepdim=True)
    found = fits.any(dim=-1)
    fallback = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    high = torch.where(found, down.gather(-1, first)[..., 0], torch.full_like(draws[..., 0], fallback[0]))
    wide = torch.where(found, across.gather(-1, first)[..., 0], torch.full_like(draws[..., 0], fallback[1]))
    top = torch.where(found, (draws[..., -3] * (height - high + 1)).floor(), ((height - high) / 2).floor())
    left = torch.where(found, (draws[..., -2] * (width - wide + 1)).floor(), ((width - wide) / 2).floor())
    return Span(top, high), Span(left, wide)
