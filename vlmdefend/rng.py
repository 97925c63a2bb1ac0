"""Randomness as an argument: one independent stream per image.

A stream is derived from (seed, purpose, image id) and drawn on the CPU, so what an image gets does not depend on
the batch it is in, its place there, the number of workers, or the device.

Whoever gets streams does not get the ids: an id may be a path with the class in it, and no defense may read a label.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def opaque(name: str) -> str:
    """Returns a hash of an id, for use where its words must not be read."""
    return hashlib.sha256(name.encode()).hexdigest()[:16]


class ImageRng:
    """One random stream for each of B images.

    Args:
        seed: the run's seed.
        ids: B image ids.
        purpose: names the use, so that two uses of one image never share numbers.
    """

    def __init__(self, seed: int, ids: Sequence[str], purpose: str = "") -> None:
        self.seed = seed
        self._ids = list(ids)
        self.purpose = purpose
        self._streams: list[torch.Generator | None] = [None] * len(self._ids)

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def names(self) -> list[str]:
        """B texts that differ between images and reveal nothing of them, :func:`opaque` of each id."""
        return [opaque(name) for name in self._ids]

    def child(self, purpose: str) -> ImageRng:
        """Returns fresh streams of the same images for another purpose."""
        return ImageRng(self.seed, self._ids, f"{self.purpose}/{purpose}")

    def select(self, index: Sequence[int] | Tensor) -> ImageRng:
        """The streams of some of the images; drawing from them advances the same streams."""
        chosen = index if isinstance(index, (list, tuple)) else [int(i) for i in index]
        part = ImageRng.__new__(ImageRng)
        part.seed, part.purpose = self.seed, self.purpose
        part._ids = [self._ids[i] for i in chosen]
        part._streams = [self._stream(i) for i in chosen]
        return part

    def uniform(self, shape: Sequence[int], low: float = 0.0, high: float = 1.0) -> Tensor:
        """Returns (B, *shape) float32 draws on the CPU, uniform in [low, high)."""
        import torch

        out = torch.empty(len(self), *shape)
        for i in range(len(self)):
            out[i].uniform_(low, high, generator=self._stream(i))
        return out

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Returns (B, *shape) float32 draws on the CPU, standard normal."""
        import torch

        out = torch.empty(len(self), *shape)
        for i in range(len(self)):
            out[i].normal_(generator=self._stream(i))
        return out

    def integers(self, shape: Sequence[int], low: int, high: int) -> Tensor:
        """Returns (B, *shape) int64 draws on the CPU, uniform in [low, high)."""
        import torch

        out = torch.empty(len(self), *shape, dtype=torch.int64)
        for i in range(len(self)):
            out[i].random_(low, high, generator=self._stream(i))
        return out

    def _stream(self, i: int) -> torch.Generator:
        stream = self._streams[i]
        if stream is None:
            import torch

            text = f"{self.seed}\0{self.purpose}\0{self._ids[i]}"
            digest = hashlib.sha256(text.encode()).digest()
            stream = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            self._streams[i] = stream
        return stream
