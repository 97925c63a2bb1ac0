"""``domain:ROOT/DOMAIN``: one domain of an adaptation set, ``ROOT/DOMAIN/class/*``."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import ClassVar

from vlmdefend.data.base import ImageSet, ListedDataset, Source
from vlmdefend.data.class_names import underscores
from vlmdefend.data.folders import image_files, labelled, printable, subfolders
from vlmdefend.data.images import decode
from vlmdefend.data.prompts import DEFAULT
from vlmdefend.data.sources import SOURCES
from vlmdefend.errors import UserError

TEST_SHARE = 0.2
LIST, LISTS = "image_list.txt", "image_list"  # VisDA-2017's file in a domain, tllib's folder beside the domains
SPLITS = ("train", "test", "all")


@SOURCES.register
class Domain(Source):
    """A domain as Office-31, Office-Home, VisDA-2017, PACS and DomainNet are distributed, or any set laid out so.

    ``ROOT/DOMAIN/class/*`` or, as in Office-31, ``ROOT/DOMAIN/images/class/*``. These sets have no splits (papers train
    and measure on the same target images): here a fifth of the images, chosen by a hash of their path, is ``test``, the
    rest ``train``; ``all`` is every image. Where ``DOMAIN_train.txt`` and ``DOMAIN_test.txt`` both lie in ROOT or in
    ``ROOT/image_list``, as in DomainNet (lines of a path and a number), they are the splits. A class is called by its
    folder, ``_`` and ``-`` read as blanks; where folders are no classes, as in VisDA-2017's ``test``, the numbers in
    ``DOMAIN/image_list.txt`` are those of the sorted classes of a domain beside it. Ids are paths relative to ROOT.
    """

    name: ClassVar[str] = "domain"
    prefix: ClassVar[str] = "domain"

    def listed(self) -> list[ListedDataset]:
        """The form of the name, for ``vlmdefend list datasets``."""
        return [
            ListedDataset("domain:ROOT/DOMAIN", "a domain of an adaptation set (Office-31 ...)", None, "your folder")
        ]

    def open(self, name: str, split: str, root: Path | None) -> ImageSet:
        """Read the folder after ``domain:``.

        Raises:
            UserError: no such domain (with those that are there), no class folder, an unknown split.
        """
        path = Path(name.partition(":")[2]).expanduser()
        if split not in SPLITS:
            raise UserError(f"{name}: has no split {split!r}; it has train, test and all.")
        names, paths, labels = _labelled(name, path)
        ids = [printable(file, path.parent) for file in paths]
        chosen = [i for i, keep in enumerate(_members(path, ids, split)) if keep]
        if not chosen:
            raise UserError(f"{name}: split {split} has no image; the domain has {len(ids)}.")
        return ImageSet(
            name=name.rstrip("/"),
            split=split,
            class_names=tuple(underscores(folder.replace("-", " ")) for folder in names),
            templates=DEFAULT,
            ids=tuple(ids[i] for i in chosen),
            labels=tuple(labels[i] for i in chosen),
            read=lambda i: decode(paths[chosen[i]], str(paths[chosen[i]])),
            encoded=lambda i: paths[chosen[i]].read_bytes(),
        )


def _labelled(name: str, path: Path) -> tuple[list[str], list[Path], list[int]]:
    """Returns the class folders' names, the images, and the class of each."""
    inner = _classes_in(name, path)
    numbers = _numbers(path / LIST)
    if numbers is None:
        folders = subfolders(inner)
        if not folders:
            raise UserError(f"{name}: {path} has no class folder; put the images of each class in a folder of its own.")
        return [folder.name for folder in folders], *labelled(folders)
    highest = max(numbers.values())
    beside = [[c.name for c in subfolders(_classes_in(name, p))] for p in _domains(path.parent) if p != path]
    classes = next((found for found in beside if len(found) > highest), None)
    if classes is None:
        raise UserError(
            f"{name}: {path / LIST} gives classes as numbers up to {highest}, and no domain beside it has folders for "
            f"them; put the set's train or validation folder into {path.parent}."
        )
    return classes, [path / file for file in numbers], list(numbers.values())


def _numbers(file: Path) -> dict[str, int] | None:
    """Returns path to class number; None: there is no such list, or each of its folders is a class."""
    if not file.is_file():
        return None
    lines = [line.rpartition(" ") for line in file.read_text("utf-8", "replace").splitlines() if line.strip()]
    if not all(number.strip().isdigit() for _, _, number in lines):
        raise UserError(f"{file}: is no list of a path and a number on each line; fetch the set again.")
    found = {path.strip(): int(number) for path, _, number in lines}
    of_folder: dict[str, set[int]] = {}
    for path, number in found.items():
        of_folder.setdefault(path.partition("/")[0], set()).add(number)
    return found if any(len(numbers) > 1 for numbers in of_folder.values()) else None


def _domains(root: Path) -> list[Path]:
    return [p for p in subfolders(root) if p.name != LISTS]


def _classes_in(name: str, path: Path) -> Path:
    """Returns the folder that holds the class folders."""
    if not path.is_dir():
        near = [p.name for p in _domains(path.parent)] if path.parent.is_dir() else []
        have = f"; {path.parent} has {', '.join(near[:8])}" if near else ""
        raise UserError(f"{name}: there is no such folder{have}; write domain:ROOT/DOMAIN.")
    inner = path / "images"  # Office-31
    alone = [p.name for p in subfolders(path)] == ["images"]
    return inner if alone and subfolders(inner) and not any(p.parent == inner for p in image_files(inner)) else path


def _members(path: Path, ids: list[str], split: str) -> list[bool]:
    """Returns which images belong to the split."""
    if split == "all":
        return [True] * len(ids)
    places = (path.parent, path.parent / LISTS)
    lists = {which: [p / f"{path.name}_{which}.txt" for p in places] for which in ("train", "test")}
    found = {which: next((file for file in files if file.is_file()), None) for which, files in lists.items()}
    written = found[split]
    if written is not None and None not in found.values():  # alone, it may hold images of the other split
        lines = written.read_text("utf-8", "replace").splitlines()
        listed = {line.rpartition(" ")[0].strip() for line in lines if line.strip()}
        missing = listed - set(ids)
        if missing:
            raise UserError(f"{written}: lists {sorted(missing)[0]}, which is not there; fetch the set again.")
        return [name in listed for name in ids]
    return [(_rank(name) < TEST_SHARE) == (split == "test") for name in ids]


def _rank(name: str) -> float:
    """Returns a number in [0, 1) that depends on the path alone, and on no label list or order."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2.0**64
