"""Class folders of image files, as ``folder:PATH`` and ImageFolder-like sets have them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from vlmdefend.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""What torchvision's ImageFolder takes for an image."""

SAME_SPLIT = (("train",), ("test", "val", "valid", "validation"))
"""Names of one split, best first: a folder ``val`` serves as ``test`` where there is no ``test``."""

SPLIT_NAMES = frozenset(name for names in SAME_SPLIT for name in names)


def split_folder(path: Path, split: str) -> Path | None:
    """Returns ``path/split``, or the folder of another name of that split, or None."""
    others = next((names for names in SAME_SPLIT if split in names), ())
    return next((path / name for name in (split, *others) if (path / name).is_dir()), None)


def subfolders(path: Path) -> list[Path]:
    """Returns the folders in ``path``, sorted by name, without hidden ones."""
    return sorted((p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")), key=lambda p: p.name)


def image_files(folder: Path) -> list[Path]:
    """Returns every image file under ``folder``, sorted; links are followed, hidden files left out."""
    return sorted(_walk(folder, set()), key=lambda p: p.as_posix())


def _walk(folder: Path, entered: set[str]) -> Iterator[Path]:
    real = os.path.realpath(folder)
    if real in entered:  # a link back to a folder above
        return
    for entry in folder.iterdir():
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(entry, entered | {real})
        elif entry.name.lower().endswith(EXTENSIONS):
            yield entry


def labelled(folders: Sequence[Path]) -> tuple[list[Path], list[int]]:
    """Returns the image files of class folders, class after class, and the class index of each.

    Raises:
        UserError: a class folder without an image, by its name; no image at all.
    """
    paths: list[Path] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        files = image_files(folder)
        if not files:
            raise UserError(
                f"class folder {folder} has no image ({', '.join(EXTENSIONS)}); put images in it, or remove it."
            )
        paths += files
        labels += [label] * len(files)
    return paths, labels


def printable(path: Path, root: Path) -> str:
    """Returns the path relative to ``root`` as an image id: with ``/``, valid UTF-8 whatever the file system holds.

    Raises:
        UserError: the path climbs out of ``root``, as one written in a list of files might.
    """
    name = path.relative_to(root).as_posix()
    if ".." in name.split("/"):
        raise UserError(f"{path}: a list of files of this set points outside the set; fetch the set again.")
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
