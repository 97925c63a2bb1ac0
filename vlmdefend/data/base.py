"""The contract of a data source: named, labelled images with stable ids, read one at a time."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from vlmdefend.errors import UserError

if TYPE_CHECKING:
    from PIL import Image


class BadImage(UserError):
    """One image that cannot be used; the message starts with its file name or id."""


class ListedDataset(NamedTuple):
    """One line of ``vlmdefend list datasets``."""

    name: str
    summary: str
    classes: int | None
    where: str  # "embedded", "torchvision", "your folder" ...


@dataclass(frozen=True)
class ImageSet:
    """A labelled image set. ``read(i)`` decodes image ``i`` when it is needed and may raise :class:`BadImage`."""

    name: str
    split: str
    class_names: tuple[str, ...]
    templates: tuple[str, ...]  # prompts with {c} for the class name
    ids: tuple[str, ...]
    labels: tuple[int, ...]
    read: Callable[[int], Image.Image]
    encoded: Callable[[int], bytes] | None = None  # the file's bytes, where files may change under the same id

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.labels):
            raise UserError(f"dataset {self.name}: {len(self.ids)} images but {len(self.labels)} labels.")
        if len(set(self.ids)) != len(self.ids):
            raise UserError(f"dataset {self.name}: two images share an id; ids must be unique.")
        highest, lowest = max(self.labels, default=-1), min(self.labels, default=0)
        if highest >= len(self.class_names) or lowest < 0:
            wrong = highest if highest >= len(self.class_names) else lowest
            raise UserError(
                f"dataset {self.name}: label {wrong} has no name; the class list has {len(self.class_names)} "
                "names, so labels must be 0 to one less than that. Check the class list against the labels."
            )

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, index: Sequence[int]) -> ImageSet:
        """Returns the images at ``index``, in that order."""
        chosen, read, encoded = list(index), self.read, self.encoded
        return replace(
            self,
            ids=tuple(self.ids[i] for i in chosen),
            labels=tuple(self.labels[i] for i in chosen),
            read=lambda i: read(chosen[i]),
            encoded=None if encoded is None else lambda i: encoded(chosen[i]),
        )

    def subset(self, limit: int | None, seed: int = 0) -> ImageSet:
        """Returns a fixed, class-balanced choice of ``limit`` images (all if None or more than there are).

        Within a class images are ranked by a hash of (seed, id); classes take turns until ``limit`` is reached, so
        class counts differ by at most one while a class has images left. The choice depends on ids alone, not on
        where the set lies or how it is listed, and a larger limit contains the smaller one. The order of the set
        is kept.

        Raises:
            UserError: ``limit`` is less than 1.
        """
        check_limit(limit)
        if limit is None or limit >= len(self):
            return self
        by_class: dict[int, list[int]] = {}
        for i in sorted(range(len(self)), key=lambda i: _rank(seed, self.ids[i])):
            by_class.setdefault(self.labels[i], []).append(i)
        # which classes get the one more, when limit is no multiple of their number, is also the hash's choice
        queues = [by_class[label] for label in sorted(by_class, key=lambda c: _rank(seed, f"class {c}"))]
        turns = (queue[k] for k in range(max(map(len, queues))) for queue in queues if k < len(queue))
        return self.select(sorted(islice(turns, limit)))

    def content_hash(self) -> str:
        """Returns a hash of all files' bytes, read once; empty where images cannot change under their ids."""
        if self.encoded is None:
            return ""
        digest = hashlib.sha256()
        for i in range(len(self)):
            try:
                digest.update(hashlib.sha256(self.encoded(i)).digest())
            except OSError:  # reading it again raises the reason, or skips it
                digest.update(b"unreadable")
        return digest.hexdigest()[:16]

    @property
    def ids_hash(self) -> str:
        """A hash of ids and labels in order: two runs with the same hash used the same images."""
        text = "\n".join(f"{i}\t{label}" for i, label in zip(self.ids, self.labels, strict=True))
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def check_limit(limit: int | None) -> None:
    """Refuses a limit that is no number of images.

    Raises:
        UserError: ``limit`` is less than 1.
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit}: give a number of images of at least 1, or leave it out for all.")


def data_root(root: Path | None) -> Path:
    """Returns the folder of downloaded sets: ``root``, else ``$VLMDEFEND_DATA``, else ``~/.cache/vlmdefend/data``."""
    return root or Path(os.environ.get("VLMDEFEND_DATA") or "~/.cache/vlmdefend/data").expanduser()


def _rank(seed: int, text: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{text}".encode("utf-8", "surrogateescape")).digest()


class Source(ABC):
    """A source of images. ``name`` is the file's name, ``prefix`` what comes before ``:`` in a data set's name."""

    name: ClassVar[str]
    prefix: ClassVar[str] = ""  # "folder" for folder:PATH; empty if the source has fixed names only

    @abstractmethod
    def listed(self) -> list[ListedDataset]:
        """Returns the fixed names of this source (for a prefix source: one line that shows its form)."""

    @abstractmethod
    def open(self, name: str, split: str, root: Path | None) -> ImageSet:
        """Opens ``name`` (as the user typed it, prefix included); ``root`` is the folder of downloads.

        Raises:
            UserError: what is missing and how to get it.
        """


def __getattr__(name: str) -> Any:
    """Names of version 0.1."""
    from vlmdefend.moved import old_member

    return old_member(__name__, name)
