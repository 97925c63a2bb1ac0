"""Reads images of a set as one batch, decoded by threads, in the given order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from vlmdefend.data.base import BadImage, ImageSet
from vlmdefend.errors import UserError
from vlmdefend.types import Batch

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor


def load_batch(
    images: ImageSet,
    index: Sequence[int],
    transform: Callable[[Image.Image], Tensor],
    *,
    skip_bad: bool,
    threads: int = 2,
) -> tuple[Batch, list[tuple[str, str]]]:
    """Reads and transforms the images at ``index``; the result does not depend on ``threads``.

    Returns:
        The batch without the bad images, (0, 3, 0, 0) if none is left, and the (id, reason) of each that was
        left out.

    Raises:
        BadImage: the first bad image in order, unless ``skip_bad``.
        UserError: images of different sizes.
    """
    import torch

    def load(i: int) -> Tensor | BadImage:
        try:
            picture = images.read(i)
        except BadImage as error:
            return error
        try:
            return transform(picture)
        except BadImage as error:
            return BadImage(f"{images.ids[i]}: {error}")

    if threads > 1:
        with ThreadPoolExecutor(threads) as pool:
            loaded = list(pool.map(load, index))
    else:
        loaded = [load(i) for i in index]

    good: list[tuple[int, Tensor]] = []
    skipped: list[tuple[str, str]] = []
    for i, outcome in zip(index, loaded, strict=True):
        if not isinstance(outcome, BadImage):
            good.append((i, outcome))
        elif skip_bad:
            skipped.append((images.ids[i], str(outcome)))
        else:
            raise outcome
    _check_sizes(images, good)
    pixels = torch.stack([tensor for _, tensor in good]) if good else torch.empty(0, 3, 0, 0)
    labels = torch.tensor([images.labels[i] for i, _ in good], dtype=torch.int64)
    return Batch([images.ids[i] for i, _ in good], pixels, labels), skipped


def _check_sizes(images: ImageSet, good: list[tuple[int, Tensor]]) -> None:
    for i, tensor in good:
        first, expected = good[0]
        if tensor.shape != expected.shape:
            raise UserError(
                f"images of one batch differ in size: {images.ids[first]} has {_size(expected)} pixels and "
                f"{images.ids[i]} has {_size(tensor)}; choose an image size to resize to, or a batch size of 1."
            )


def _size(tensor: Tensor) -> str:
    return f"{tensor.shape[-1]} x {tensor.shape[-2]}"
