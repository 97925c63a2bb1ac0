"""AugMix: each view mixed with three chains of mild random changes of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import equalize

from vlmdefend.attacks.bpda import bpda
from vlmdefend.types import per_image

CHAINS, DEPTH = 3, 3
DRAWS = CHAINS + 1 + CHAINS + CHAINS * DEPTH * 3  # numbers that one view needs

ROUNDING = 1e-3  # of a level: k / 255 times 255 may be a little less than k

# Images (N, 3, H, W), how strong (N,) as a share of the strongest, and the direction (N,), 1 or -1.
Operation = Callable[[Tensor, Tensor, Tensor], Tensor]


def augmix(images: Tensor, draws: Tensor, severity: float = 1.0) -> Tensor:
    """Applies AugMix to (N, 3, H, W) in [0, 1]: m x + (1 - m) sum_i w_i chain_i(x) (Hendrycks et al. 2020, alg. 1).

    w is drawn from Dirichlet(1, 1, 1), m from Beta(1, 1). A chain has one to three operations, each drawn from the nine
    that share nothing with the corruptions of ImageNet-C (no contrast, brightness, colour or sharpness), as strong as
    the official code makes them: up to ``severity`` tenths of the strongest. TPT and R-TPT have severity 1 and no
    consistency loss, since nothing is trained. Whole degrees, pixels and levels, as there; but the image between two
    operations is not rounded to 8 bits, and a rotation is three shears, each interpolated along one axis, so that it
    has the same gradient on every run of a GPU. What counts levels (equalize, posterize) has the slope of the identity.

    Args:
        draws: (N, :data:`DRAWS`) uniform in [0, 1).
    """
    numbers = draws.to(images.device)
    weights = -(1 - numbers[:, :CHAINS]).clamp_min(1e-12).log()  # exponential; as shares they are Dirichlet(1, 1, 1)
    weights = weights / weights.sum(dim=1, keepdim=True)
    keep, depths = numbers[:, CHAINS], 1 + (DEPTH * numbers[:, CHAINS + 1 : 2 * CHAINS + 1]).long()
    chosen, level, sign = numbers[:, 2 * CHAINS + 1 :].view(-1, CHAINS, DEPTH, 3).unbind(dim=-1)
    chosen = (len(OPERATIONS) * chosen).long()
    level, sign = (0.1 + (severity - 0.1) * level) / 10, torch.where(sign < 0.5, -1.0, 1.0)
    mixed = per_image(keep, images) * images
    for chain in range(CHAINS):
        changed = images
        for step in range(DEPTH):
            for number, operation in enumerate(OPERATIONS):
                at = ((chosen[:, chain, step] == number) & (step < depths[:, chain])).nonzero()[:, 0]
                if len(at):
                    new = operation(changed[at], level[at, chain, step], sign[at, chain, step])
                    changed = changed.index_copy(0, at, new)
        mixed = mixed + per_image((1 - keep) * weights[:, chain], images) * changed
    return mixed


def slide(images: Tensor, shift: Tensor) -> Tensor:
    """Shifts rows of (N, C, H, W) by (N, H) pixels: each is read ``shift`` to the right; linear, zero outside."""
    width = images.shape[-1]
    place = torch.arange(width, device=images.device) + shift[..., None]  # (N, H, W)
    first = place.floor()
    moved = torch.zeros_like(images)
    for at, share in ((first, 1 - (place - first)), (first + 1, place - first)):
        inside = (at >= 0) & (at < width)
        taken = images.gather(-1, at.clamp(0, width - 1).long()[:, None].expand_as(images))
        moved = moved + (share * inside)[:, None] * taken
    return moved


def autocontrast(images: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    """Stretches each channel to [0, 1]; a channel of one value stays."""
    low, high = images.amin(dim=(-2, -1), keepdim=True), images.amax(dim=(-2, -1), keepdim=True)
    flat = high == low
    return torch.where(flat, images, (images - low) / torch.where(flat, 1.0, high - low))


def equalized(images: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    """Equalises the histogram of each channel over 256 levels."""
    return _EQUALIZE(images)


def posterized(images: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    """The upper bits of each level: four, less the whole part of four times ``level``."""
    width = per_image(2 ** (4 + (4 * level).floor()), images)
    return _kept(images, ((255 * images.detach() + ROUNDING) / width).floor() * width / 255)


def rotated(images: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    """Rotates about the centre by the whole part of 30 ``level`` degrees, counter-clockwise if positive."""
    angle = torch.deg2rad(sign * (30 * level).floor())
    aside, down = (torch.arange(size, device=images.device) - (size - 1) / 2 for size in images.shape[:-3:-1])
    across = -(angle / 2).tan()[:, None] * down
    turned = slide(images, across)
    turned = slide(turned.mT, angle.sin()[:, None] * aside).mT
    return slide(turned, across)


def solarized(images: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    """Inverts values above 256 minus the whole part of 256 times ``level``."""
    threshold = per_image(256 - (256 * level).floor(), images)
    return torch.where(255 * images + ROUNDING >= threshold, 1 - images, images)


def sheared(images: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    """Shears rows by up to 0.3 of their height in the image."""
    rows = torch.arange(images.shape[-2], device=images.device) + 0.5
    return slide(images, (0.3 * level * sign)[:, None] * rows)


def translated(images: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    """Shifts all rows by whole pixels, up to a third of the side."""
    shift = sign * (images.shape[-1] / 3 * level).floor()
    return slide(images, shift[:, None].expand(-1, images.shape[-2]))


def upright(operation: Operation) -> Operation:
    """Applies the operation along columns in place of rows."""
    return lambda images, level, sign: operation(images.mT, level, sign).mT


def _kept(images: Tensor, exact: Tensor) -> Tensor:
    """Returns the values of ``exact`` with the slope of the identity."""
    return images + (exact - images).detach()


_EQUALIZE = bpda(lambda images: equalize(images.clamp(0.0, 1.0)))
OPERATIONS: tuple[Operation, ...] = (
    autocontrast,
    equalized,
    posterized,
    rotated,
    solarized,
    sheared,
    upright(sheared),
    translated,
    upright(translated),
)
