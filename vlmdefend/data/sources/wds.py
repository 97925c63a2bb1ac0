"""``wds:PATH``: webdataset shards on disk, in CLIP_benchmark's layout or a single tar file."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from vlmdefend.data.base import ImageSet, ListedDataset, Source
from vlmdefend.data.shards import image_set, open_layout
from vlmdefend.data.sources import SOURCES
from vlmdefend.errors import UserError


@SOURCES.register
class WebDataset(Source):
    """A folder as :mod:`vlmdefend.data.shards` describes it (``val`` serves as ``test``), or one ``.tar``.

    The class names of a single tar are read from ``classnames.txt`` beside it or one folder up. Ids are the keys
    of the samples.
    """

    name: ClassVar[str] = "wds"
    prefix: ClassVar[str] = "wds"

    def listed(self) -> list[ListedDataset]:
        """The form of the name, for ``vlmdefend list datasets``."""
        return [
            ListedDataset("wds:PATH", "webdataset shards in CLIP_benchmark's layout, or one .tar", None, "your folder")
        ]

    def open(self, name: str, split: str, root: Path | None) -> ImageSet:
        """Read the shards after ``wds:``.

        Raises:
            UserError: nothing there, or something wrong in the layout, by name.
        """
        path = Path(name.partition(":")[2]).expanduser()
        if path.is_dir():
            return open_layout(name.rstrip("/"), path, split)
        if not path.is_file():
            raise UserError(f"{name}: there is no such folder or file; give a folder of shards, or one .tar file.")
        beside = (folder for folder in path.absolute().parents[:2] if (folder / "classnames.txt").is_file())
        return image_set(name, split, [path], next(beside, path.parent))
