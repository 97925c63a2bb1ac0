"""The starts and proposals of the Square attack, for a batch in which every image has its own window and size."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vlmdefend.rng import ImageRng
from vlmdefend.types import Norm

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of 10,000 queries


class Patterns(NamedTuple):
    """The bumps of Andriushchenko et al. 2020, eq. 2, by side: ``values[place[side]]`` is (S, S), unit L2 norm."""

    values: Tensor  # (K, S, S), zero outside [0, side)^2
    place: Tensor  # (S + 1,) int64


def window_sides(queries: int, p_init: float, height: int, width: int, norm: Norm, rescale: bool) -> list[int]:
    """The side of the window of each query: the share of pixels halves at :data:`HALVINGS`; odd under L2."""
    sides = []
    for query in range(queries):
        at = query * 10_000 // queries if rescale else query
        share = p_init / 2 ** sum(at > halving for halving in HALVINGS)
        side = max(round(math.sqrt(share * height * width)), 1 if norm == "linf" else 3)
        side += norm == "l2" and side % 2 == 0
        sides.append(min(side, height, width))
    return sides


def put_stripes(origin: Tensor, eps: float | Tensor, rng: ImageRng) -> Tensor:
    """Adds vertical stripes of +eps and -eps, one sign per channel and column."""
    _, channels, _, width = origin.shape
    return (origin + _signs(rng.uniform((channels, 1, width)).to(origin.device)) * eps).clamp_(0.0, 1.0)


def put_square(best: Tensor, origin: Tensor, eps: float | Tensor, side: Tensor, numbers: Tensor) -> Tensor:
    """Sets a window of each image to +eps or -eps around the clean pixels, one sign per channel."""
    window = _window(best, side, numbers[:, 0], numbers[:, 1])
    painted = (origin + _signs(numbers[:, 5:, None, None]) * eps).clamp_(0.0, 1.0)
    return torch.where(window, painted, best)


def patterns(sides: Tensor, height: int, width: int, device: torch.device) -> Patterns:
    """Returns the bump of every side that occurs."""
    largest = min(height, width)
    distinct = sorted(set(sides.tolist()))
    place = torch.zeros(largest + 1, dtype=torch.int64)
    place[distinct] = torch.arange(len(distinct))
    values = torch.zeros(len(distinct), largest, largest)
    for row, side in enumerate(distinct):
        values[row, :side, :side] = bump(side)
    return Patterns(values.to(device), place.to(device))


def bump(side: int) -> Tensor:
    """Returns a (side, side) positive pyramid over a negative one, of unit L2 norm."""
    both = torch.cat([_pyramid(side // 2, side), -_pyramid(side - side // 2, side)])
    return both / both.square().sum().sqrt()


def grid_of_tiles(origin: Tensor, eps: float | Tensor, rng: ImageRng) -> Tensor:
    """A grid of bumps, five along the shorter side, with random signs and flips, scaled to the radius."""
    count, channels, height, width = origin.shape
    side = max(min(height, width) // 5, 1)
    rows, columns = height // side, width // side
    tile = bump(side).to(origin.device)
    numbers = rng.uniform((1 + channels, rows, columns)).to(origin.device)
    tiles = torch.where((numbers[:, :1] < 0.5)[..., None, None], tile, tile.T) * _signs(numbers[:, 1:])[..., None, None]
    delta = torch.zeros_like(origin)
    top, left = (height - rows * side) // 2, (width - columns * side) // 2
    laid = tiles.transpose(3, 4).reshape(count, channels, rows * side, columns * side)
    delta[:, :, top : top + rows * side, left : left + columns * side] = laid
    return _at_radius(origin, delta, eps)


def shift_energy(
    best: Tensor, origin: Tensor, eps: float | Tensor, side: Tensor, numbers: Tensor, tables: Patterns
) -> Tensor:
    """Clears one window and adds its energy, and what the radius leaves unused, to a bump in another."""
    delta = best - origin
    window, cleared = (_window(best, side, numbers[:, at], numbers[:, at + 1]) for at in (0, 2))
    unused = (eps**2 - delta.square().sum((1, 2, 3), keepdim=True)).clamp_min(0.0) / best.shape[1]
    energy = _energy(delta * (window | cleared)) + unused  # (B, C, 1, 1)
    old = delta * window
    new = _placed(tables, best, side, numbers) * _signs(numbers[:, 5:, None, None])
    new = new + old / (_energy(old).sqrt() + 1e-12)
    new = new / (_energy(new).sqrt() + 1e-12) * energy.sqrt()
    return _at_radius(origin, torch.where(window, new, delta.masked_fill(cleared, 0.0)), eps)


def _energy(values: Tensor) -> Tensor:
    return values.square().sum((2, 3), keepdim=True)


def _at_radius(origin: Tensor, delta: Tensor, eps: float | Tensor) -> Tensor:
    length = delta.square().sum((1, 2, 3), keepdim=True).sqrt() + 1e-12
    return (origin + delta * (eps / length)).clamp_(0.0, 1.0)


def _signs(uniform: Tensor) -> Tensor:
    return torch.where(uniform < 0.5, -1.0, 1.0)


def _corner(span: int, side: Tensor, uniform: Tensor) -> Tensor:
    """(B,) int64, uniform over the places where the window fits."""
    return torch.minimum((uniform * (span - side + 1)).long(), span - side)


def _window(like: Tensor, side: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """(B, 1, H, W) True inside a window of each image."""
    inside = []
    for span, uniform in ((like.shape[2], row), (like.shape[3], column)):
        at = torch.arange(span, device=like.device) - _corner(span, side, uniform)[:, None]
        inside.append((at >= 0) & (at < side[:, None]))
    return (inside[0][:, :, None] & inside[1][:, None, :])[:, None]


def _placed(tables: Patterns, like: Tensor, side: Tensor, numbers: Tensor) -> Tensor:
    """(B, 1, H, W) each image's bump in its window, flipped for half of the draws, zero elsewhere."""
    at, largest = [], tables.values.shape[1]
    for axis, span in enumerate(like.shape[2:]):
        offset = torch.arange(span, device=like.device) - _corner(span, side, numbers[:, axis])[:, None]
        at.append(offset.clamp(0, largest - 1))
    chosen = tables.place[side][:, None, None]
    rows, columns = at[0][:, :, None], at[1][:, None, :]
    flip = (numbers[:, 4] < 0.5)[:, None, None]
    placed = torch.where(flip, tables.values[chosen, columns, rows], tables.values[chosen, rows, columns])
    return placed[:, None] * _window(like, side, numbers[:, 0], numbers[:, 1])


def _pyramid(height: int, width: int) -> Tensor:
    """(height, width) the sum of 1 / (n + 1)^2 over nested squares around the centre; highest there."""
    down = (torch.arange(height) - height // 2).abs()[:, None]
    along = (torch.arange(width) - width // 2).abs()[None, :]
    distance = torch.maximum(down, along)
    count = max(height // 2, width // 2) + 1
    weights = 1.0 / torch.arange(1, count + 1) ** 2
    return weights.flip(0).cumsum(0).flip(0)[distance]
