"""``domain:ROOT/DOMAIN``: one domain of an adaptation set, ``ROOT/DOMAIN/class/*``."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import ClassVar

from vlmdefend.data import SOURCES
from vlmdefend.data.base import ImageSet, Listed, Source
from vlmdefend.data.class_names import underscores
from vlmdefend.data.folders import image_files, labelled, printable, subfolders
from vlmdefend.data.images import decode
from vlmdefend.data.prompts import DEFAULT
from vlmdefend.errors import UserError

TEST_SHARE = 0.2
SPLITS = ("train", "test", "all")


@SOURCES.register
class Domain(Source):
    """A domain as Office-31, Office-Home, VisDA-2017, PACS and DomainNet are distributed, or any set laid out so.

    ``ROOT/DOMAIN/class/*`` or, as in Office-31, ``ROOT/DOMAIN/images/class/*``. These sets have no splits (papers train
    and measure on the same target images): here a fifth of the images, chosen by a hash of their path, is ``test``, the
    rest ``train``; ``all`` is every image. Where ``ROOT/DOMAIN_train.txt`` and ``ROOT/DOMAIN_test.txt`` exist, as in
    DomainNet (lines of a path and a number), they are the splits. A class is called by its folder, ``_`` and ``-`` read
    as blanks. Ids are paths relative to ROOT.
    """

    name: ClassVar[str] = "domain"
    prefix: ClassVar[str] = "domain"

    def listed(self) -> list[Listed]:
        """The form of the name."""
        return [Listed("domain:ROOT/DOMAIN", "a domain of an adaptation set (Office-31 ...)", None, "your folder")]

    def open(self, name: str, split: str, root: Path | None) -> ImageSet:
        """Read the folder after ``domain:``.

        Raises:
            UserError: no such domain (with those that are there), no class folder, an unknown split.
        """
        path = Path(name.partition(":")[2]).expanduser()
        if split not in SPLITS:
            raise UserError(f"{name}: has no split {split!r}; it has train, test and all.")
        folders = subfolders(_classes_in(name, path))
        if not folders:
            raise UserError(f"{name}: {path} has no class folder; put the images of each class in a folder of its own.")
        paths, labels = labelled(folders)
        ids = [printable(file, path.parent) for file in paths]
        chosen = [i for i, keep in enumerate(_members(path, ids, split)) if keep]
        if not chosen:
            raise UserError(f"{name}: split {split} has no image; the domain has {len(ids)}.")
        return ImageSet(
            name=name.rstrip("/"),
            split=split,
            class_names=tuple(underscores(folder.name.replace("-", " ")) for folder in folders),
            templates=DEFAULT,
            ids=tuple(ids[i] for i in chosen),
            labels=tuple(labels[i] for i in chosen),
            read=lambda i: decode(paths[chosen[i]], str(paths[chosen[i]])),
            encoded=lambda i: paths[chosen[i]].read_bytes(),
        )


def _classes_in(name: str, path: Path) -> Path:
    """The folder that holds the class folders."""
    if not path.is_dir():
        near = [p.name for p in subfolders(path.parent)] if path.parent.is_dir() else []
        have = f"; {path.parent} has {', '.join(near[:8])}" if near else ""
        raise UserError(f"{name}: there is no such folder{have}; write domain:ROOT/DOMAIN.")
    inner = path / "images"  # Office-31
    alone = [p.name for p in subfolders(path)] == ["images"]
    return inner if alone and subfolders(inner) and not any(p.parent == inner for p in image_files(inner)) else path


def _members(path: Path, ids: list[str], split: str) -> list[bool]:
    """Which images are of the split."""
    if split == "all":
        return [True] * len(ids)
    written = path.parent / f"{path.name}_{split}.txt"
    if written.is_file():
        lines = written.read_text("utf-8", "replace").splitlines()
        listed = {line.rpartition(" ")[0].strip() for line in lines if line.strip()}
        missing = listed - set(ids)
        if missing:
            raise UserError(f"{written}: lists {sorted(missing)[0]}, which is not there; fetch the set again.")
        return [name in listed for name in ids]
    return [(_rank(name) < TEST_SHARE) == (split == "test") for name in ids]


def _rank(name: str) -> float:
    """A number in [0, 1) that depends on the path alone, and on no label list or order."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2.0**64
