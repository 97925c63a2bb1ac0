"""The image sets that come with the package: they need no network and no folder."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import ClassVar

from vlmdefend.data.base import ImageSet, ListedDataset, Source
from vlmdefend.data.shards import open_layout
from vlmdefend.data.sources import SOURCES

ASSETS = Path(__file__).parents[2] / "assets"

SETS = {
    "fashion": ("Fashion-MNIST, 28x28 grey product photographs: 10,000 for training, 2,000 for test", 10),
    "mnist": ("handwritten digits, 28x28 grey: 5,000 of MNIST", 10),
    "uci-digits": ("handwritten digits of another source (UCI), brought to 28x28", 10),
    "emoji:google": ("emoji drawn by Google (Noto), 20 categories", 20),
    "emoji:twitter": ("emoji drawn by Twitter (Twemoji), 20 categories", 20),
    "emoji:fluent": ("emoji drawn by Microsoft (Fluent 3D), 20 categories", 20),
    "emoji:openmoji": ("emoji drawn by OpenMoji, in colour, 20 categories", 20),
    "emoji:sketch": ("emoji drawn by OpenMoji, as black line art, 20 categories", 20),
}
"""Name -> what it is, and the number of classes. The folder in ASSETS is the name with ``:`` as ``-``."""


@SOURCES.register
class Embedded(Source):
    """Package data in CLIP_benchmark's webdataset layout, splits ``train`` and ``test``."""

    name: ClassVar[str] = "embedded"

    def listed(self) -> list[ListedDataset]:
        """The embedded sets, by name, for ``vlmdefend list datasets``."""
        return [ListedDataset(name, summary, classes, "embedded") for name, (summary, classes) in SETS.items()]

    def open(self, name: str, split: str, root: Path | None) -> ImageSet:
        """Read one set; ``root`` is not used.

        Raises:
            UserError: there is no such split.
        """
        return _opened(name, ASSETS / name.replace(":", "-"), split)


@cache
def _opened(name: str, folder: Path, split: str) -> ImageSet:
    """Reads a set once per process: package data does not change while it runs."""
    return open_layout(name, folder, split)
