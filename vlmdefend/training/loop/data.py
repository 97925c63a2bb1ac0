"""The images of a training run: the held-out part, the order of each epoch, and batches decoded ahead of time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from vlmdefend.data.base import ImageSet
from vlmdefend.data.loader import load_batch
from vlmdefend.errors import UserError
from vlmdefend.types import Batch

if TYPE_CHECKING:
    from PIL import Image

CACHE_BYTES = 2 * 2**30


def hold_out(images: ImageSet, count: int, seed: int) -> tuple[ImageSet, ImageSet]:
    """Splits a training set into images to train on and ``count`` held-out images, class-balanced.

    The choice depends on ids and ``seed`` alone.

    Raises:
        UserError: nothing would be left to train on.
    """
    if not 0 <= count < len(images):
        raise UserError(
            f"--held-out {count}: dataset {images.name} has {len(images)} training images; hold out fewer than that."
        )
    if not count:
        return images, images.select([])
    held = images.subset(count, seed)
    apart = frozenset(held.ids)
    return images.select([i for i, name in enumerate(images.ids) if name not in apart]), held


def epoch_order(count: int, seed: int, purpose: str) -> list[int]:
    """Returns a permutation of ``count`` images, a function of (seed, purpose); a run can resume at any step."""
    digest = hashlib.sha256(f"{seed}\0order\0{purpose}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order


def batches(order: Sequence[int], size: int) -> list[list[int]]:
    """Returns the global batches of an epoch; the last may be smaller and is trained on too."""
    return [list(order[first : first + size]) for first in range(0, len(order), size)]


class Images(Protocol):
    """The interface through which the loop reads images."""

    def __len__(self) -> int:
        """Returns the number of images (or pairs) of an epoch."""
        ...

    def order(self, seed: int, purpose: str) -> list[Any]:
        """Returns the order of the epoch ``purpose``, a function of seed and purpose."""
        ...

    def stream(self, parts: Sequence[Sequence[Any]]) -> Iterator[Batch]:
        """Yields one batch after the other."""
        ...


class TrainingImages:
    """A set of images as pixels, decoded once if they fit into memory.

    Args:
        images: the set.
        transform: to (3, H, W) in [0, 1], every value k/255: what is kept are the levels k, without loss.
        skip_bad: leave out images that cannot be read, rather than stop.
        threads: that decode.
        cache_bytes: keep no more than this.
    """

    def __init__(
        self,
        images: ImageSet,
        transform: Callable[[Image.Image], Tensor],
        *,
        skip_bad: bool = False,
        threads: int = 2,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.images, self.transform, self.skip_bad, self.threads = images, transform, skip_bad, threads
        self.skipped: dict[str, str] = {}
        self._room = cache_bytes
        self._levels: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.images)

    def order(self, seed: int, purpose: str) -> list[int]:
        """Returns every image once."""
        return epoch_order(len(self), seed, purpose)

    def batch(self, index: Sequence[int]) -> Batch:
        """Returns the images at ``index``, on the CPU.

        Raises:
            BadImage: one cannot be read, unless ``skip_bad``.
            UserError: images of different sizes.
        """
        if all(i in self._levels for i in index) and index:
            pixels = torch.stack([self._levels[i] for i in index]).float().div_(255)
            labels = torch.tensor([self.images.labels[i] for i in index], dtype=torch.int64)
            return Batch([self.images.ids[i] for i in index], pixels, labels)
        batch, bad = load_batch(self.images, index, self.transform, skip_bad=self.skip_bad, threads=self.threads)
        self.skipped.update(bad)
        if not bad:
            self._keep(index, batch.images)
        return batch

    def stream(self, parts: Sequence[Sequence[int]]) -> Iterator[Batch]:
        """Yields batches; the next one is read while the last one is used."""
        with ThreadPoolExecutor(1) as reader:
            ahead = reader.submit(self.batch, parts[0]) if parts else None
            for following in [*parts[1:], None] if parts else []:
                assert ahead is not None
                ready = ahead.result()
                ahead = reader.submit(self.batch, following) if following is not None else None
                yield ready

    def _keep(self, index: Sequence[int], images: Tensor) -> None:
        levels = (images * 255).round().to(torch.uint8)
        for i, one in zip(index, levels, strict=True):
            if i not in self._levels and one.nbytes <= self._room:
                self._levels[i] = one.clone()
                self._room -= one.nbytes
