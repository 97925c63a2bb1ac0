"""``folder:PATH``: a folder of class folders, as torchvision's ImageFolder reads it."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from vlmdefend.data.base import ImageSet, ListedDataset, Source
from vlmdefend.data.class_names import underscores
from vlmdefend.data.folders import SPLIT_NAMES, labelled, printable, split_folder, subfolders
from vlmdefend.data.images import decode
from vlmdefend.data.prompts import DEFAULT
from vlmdefend.data.sources import SOURCES
from vlmdefend.errors import UserError


@SOURCES.register
class Folder(Source):
    """Images in one folder per class.

    ``PATH/class/*``, or ``PATH/<split>/class/*`` where ``PATH/<split>`` exists (``val``, ``valid`` and
    ``validation`` serve as ``test``). A class is called by its folder, ``_`` and ``-`` read as blanks, unless
    ``PATH/classes.txt`` names it: one name a line in the order of the sorted folders, or lines of a folder, a tab
    and a name. Ids are paths relative to the folder that holds the class folders.
    """

    name: ClassVar[str] = "folder"
    prefix: ClassVar[str] = "folder"

    def listed(self) -> list[ListedDataset]:
        """The form of the name, for ``vlmdefend list datasets``."""
        return [ListedDataset("folder:PATH", "one folder per class (ImageFolder)", None, "your folder")]

    def open(self, name: str, split: str, root: Path | None) -> ImageSet:
        """Read the folder after ``folder:``.

        Raises:
            UserError: no such folder or split, no or an empty class folder, a ``classes.txt`` that does not fit.
        """
        path = Path(name.partition(":")[2]).expanduser()
        if not path.is_dir():
            raise UserError(
                f"{name}: there is no such folder; give the path of a folder that has one folder per class."
            )
        top = _top(name, path, split)
        folders = subfolders(top)
        if not folders:
            raise UserError(f"{name}: {top} has no class folder; put the images of each class in a folder of its own.")
        paths, labels = labelled(folders)
        return ImageSet(
            name=name.rstrip("/"),
            split=split,
            class_names=_class_names(path, top, folders),
            templates=DEFAULT,
            ids=tuple(printable(p, top) for p in paths),
            labels=tuple(labels),
            read=lambda i: decode(paths[i], str(paths[i])),
            encoded=lambda i: paths[i].read_bytes(),
        )


def _top(name: str, path: Path, split: str) -> Path:
    found = split_folder(path, split)
    if found is None:
        present = [p.name for p in subfolders(path)]
        if present and SPLIT_NAMES.issuperset(present):
            raise UserError(f"{name}: has no split {split!r}; it has {', '.join(present)}.")
    return found or path


def _class_names(path: Path, top: Path, folders: list[Path]) -> tuple[str, ...]:
    written = next((f for f in (path / "classes.txt", top / "classes.txt") if f.is_file()), None)
    if written is None:
        return tuple(underscores(folder.name.replace("-", " ")) for folder in folders)
    try:
        lines = [line for line in written.read_text("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise UserError(f"{written}: not UTF-8 text; save it as UTF-8.") from None
    if any("\t" in line for line in lines):
        return _by_folder(written, lines, folders)
    if len(lines) != len(folders):
        raise UserError(
            f"{written}: has {len(lines)} names, but {top} has {len(folders)} class folders; write one name a line "
            "in the order of the sorted folders, or lines of a folder, a tab and a name."
        )
    return tuple(line.strip() for line in lines)


def _by_folder(written: Path, lines: list[str], folders: list[Path]) -> tuple[str, ...]:
    names: dict[str, str] = {}
    for line in lines:
        folder, tab, readable = line.partition("\t")
        if not tab or not readable.strip():
            raise UserError(f"{written}: line {line!r} is not a folder, a tab and a name, as other lines are.")
        if folder.strip() in names:
            raise UserError(f"{written}: names the folder {folder.strip()!r} twice; keep one of the lines.")
        names[folder.strip()] = readable.strip()
    missing = [folder.name for folder in folders if folder.name not in names]
    if missing:
        raise UserError(f"{written}: has no name for the class folder {missing[0]!r}; add a line for it.")
    return tuple(names[folder.name] for folder in folders)
