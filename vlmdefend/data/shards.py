"""Reads webdataset shards in CLIP_benchmark's layout: the embedded sets and ``wds:PATH``.

::

    classnames.txt                          one name a line, by label
    zeroshot_classification_templates.txt   one prompt a line, {c} for the class name
    <split>/nshards.txt                     the number of shards
    <split>/0.tar, 1.tar ...                (or .tar.gz) KEY.webp|png|jpg|jpeg + KEY.cls, and KEY.txt for a caption

A member's name is a label in messages and ids and never becomes a path. Opening reads headers and labels; pictures
are decoded on demand. A ``.tar`` stays on disk; a ``.tar.gz`` is held in memory, unpacked.
"""

from __future__ import annotations

import gzip
import io
import re
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmdefend.data.base import ImageSet
from vlmdefend.data.folders import split_folder, subfolders
from vlmdefend.data.images import decode
from vlmdefend.data.prompts import templates_for
from vlmdefend.errors import UserError

IMAGES = ("webp", "png", "jpg", "jpeg")
BLOCK = 512  # a tar file is a row of blocks of this many bytes, and ends with blocks of zeros


@dataclass
class TarShard:
    """One tar file: on disk, or (``.gz``) unpacked in memory."""

    path: Path
    unpacked: bytes | None

    def bytes_at(self, span: tuple[int, int]) -> bytes:
        """Returns the bytes of a member, given as (offset, length)."""
        offset, length = span
        if self.unpacked is not None:
            return self.unpacked[offset : offset + length]
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.read(length)


@dataclass
class ShardSample:
    """The members of a shard that share a key."""

    key: str
    shard: TarShard
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)  # extension -> (offset, length)
    written_label: bytes | None = None  # the content of KEY.cls

    @property
    def image(self) -> str | None:
        """The extension of the picture, or None where the sample has no picture."""
        return next((extension for extension in IMAGES if extension in self.spans), None)

    @property
    def where(self) -> str:
        """The sample in messages: the shard's file name and the key."""
        return f"{self.shard.path.name}/{self.key}"

    def bytes_of(self, extension: str) -> bytes:
        """Returns the content of the member ``KEY.extension``."""
        return self.shard.bytes_at(self.spans[extension])

    def caption(self) -> str | None:
        """Returns the text of ``KEY.txt``, or None."""
        return self.bytes_of("txt").decode("utf-8", "replace").strip() if "txt" in self.spans else None


def open_layout(name: str, folder: Path, split: str) -> ImageSet:
    """Opens the split of a set in CLIP_benchmark's layout in ``folder``.

    Raises:
        UserError: a split, shard, label or name is missing, or a shard is damaged.
    """
    if not folder.is_dir():
        raise UserError(f"{name}: its folder {folder} is missing; install the package (or fetch the set) again.")
    top = split_folder(folder, split)
    if top is None:
        splits = [p.name for p in subfolders(folder) if shard_paths(p)]
        have = f"it has {', '.join(splits)}" if splits else "no folder in it holds shards (0.tar, 1.tar ...)"
        raise UserError(f"{name}: has no split {split!r} in {folder}; {have}.")
    paths = shard_paths(top)
    if not paths:
        raise UserError(f"{name}: {top} holds no shard; expected 0.tar, 1.tar ... (or .tar.gz) in it.")
    return image_set(name, split, paths, folder)


def shard_paths(folder: Path) -> list[Path]:
    """Returns the shards of a split by number: as many as ``nshards.txt`` gives, or all.

    Raises:
        UserError: ``nshards.txt`` is no number, or one of the shards it counts is missing.
    """
    found = {p.name.partition(".")[0]: p for p in folder.iterdir() if p.name.endswith((".tar", ".tar.gz"))}
    counted = folder / "nshards.txt"
    if not counted.is_file():
        return [found[stem] for stem in sorted(found, key=lambda s: (len(s), s) if s.isdecimal() else (99, s))]
    text = counted.read_text("utf-8", "replace").strip()
    if not re.fullmatch(r"[0-9]{1,6}", text):
        raise UserError(f"{counted}: {text[:40]!r} is not a number of shards.")
    missing = [f"{i}.tar" for i in range(int(text)) if str(i) not in found]
    if missing:
        raise UserError(f"{counted} counts {text} shards, but {missing[0]} is missing in {folder}; fetch it again.")
    return [found[str(i)] for i in range(int(text))]


def image_set(name: str, split: str, paths: Sequence[Path], described_in: Path) -> ImageSet:
    """Returns the labelled images of some shards; ``described_in`` holds ``classnames.txt`` and the templates.

    A sample without a label is left out where it has a caption (it is there for training), else refused.

    Raises:
        UserError: a damaged shard, a sample without label or picture, a label without a name.
    """
    kind = "".join(_lines(described_in / "dataset_type.txt")) or "classification"
    if kind != "classification":
        raise UserError(
            f"{name}: is a {kind} set (dataset_type.txt); only classification sets have one label an image."
        )
    class_names = tuple(_lines(described_in / "classnames.txt"))
    if not class_names:
        raise UserError(f"{name}: no names in {described_in / 'classnames.txt'}; write one class name a line there.")
    samples: list[ShardSample] = []
    labels: list[int] = []
    for sample in (sample for path in paths for sample in read_shard(path)):
        label = _label(name, sample, len(class_names))
        if label is not None:
            samples.append(sample)
            labels.append(label)
    if not samples:
        raise UserError(f"{name}: no sample in {paths[0].parent} has a label (KEY.cls); it is no classification set.")
    keys = [sample.key for sample in samples]
    if len(set(keys)) < len(keys):  # each shard counts from zero
        keys = [sample.where for sample in samples]
    return ImageSet(
        name=name,
        split=split,
        class_names=class_names,
        templates=tuple(_lines(described_in / "zeroshot_classification_templates.txt")) or templates_for(name),
        ids=tuple(keys),
        labels=tuple(labels),
        read=lambda i: decode(samples[i].bytes_of(samples[i].image or ""), f"{samples[i].where}.{samples[i].image}"),
        encoded=lambda i: samples[i].bytes_of(samples[i].image or ""),
    )


def _label(name: str, sample: ShardSample, classes: int) -> int | None:
    """Returns the checked label of a sample; None if it is no classification sample."""
    if sample.written_label is None:
        if sample.image is None or "txt" in sample.spans:
            return None
        raise UserError(f"{name}: {sample.where} has a picture but no label (.cls) and no caption (.txt).")
    if sample.image is None:
        raise UserError(f"{name}: {sample.where} has a label but no picture ({', '.join(IMAGES)}).")
    text = sample.written_label.decode("ascii", "replace").strip()
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise UserError(f"{name}: {sample.where}.cls holds {text[:40]!r}, expected a whole number from 0.")
    if int(text) >= classes:
        raise UserError(
            f"{name}: {sample.where}.cls is label {int(text)}, but classnames.txt has {classes} names, for 0 to "
            f"{classes - 1}; add the missing names."
        )
    return int(text)


def read_shard(path: Path) -> list[ShardSample]:
    """Returns the samples of one shard, in the order of their first member.

    Raises:
        UserError: the file is no tar file, truncated or damaged, or holds a member twice.
    """
    try:
        shard = TarShard(path, gzip.decompress(path.read_bytes()) if path.name.endswith(".gz") else None)
        with path.open("rb") if shard.unpacked is None else io.BytesIO(shard.unpacked) as file:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                members = tar.getmembers()
                end = tar.offset
            # tarfile takes a damaged or cut-off header for the end; only a block of zeros is one
            file.seek(end)
            if file.read(BLOCK) != bytes(BLOCK) or any(m.offset_data + m.size > end for m in members):
                raise EOFError("it ends before its end mark")
            samples: dict[str, ShardSample] = {}
            for member in members:
                folder, _, base = member.name.rpartition("/")
                stem, _, extension = base.partition(".")
                if not member.isreg() or not stem or stem.startswith("__"):
                    continue  # folders, links, ._names of macOS, notes of the writing program
                key, extension = f"{folder}/{stem}" if folder else stem, extension.lower()
                sample = samples.setdefault(key, ShardSample(key, shard))
                if extension in sample.spans:
                    raise UserError(f"shard {path}: holds {member.name!r} twice; write it anew.")
                sample.spans[extension] = (member.offset_data, member.size)
                if extension == "cls":
                    file.seek(member.offset_data)
                    sample.written_label = file.read(min(member.size, BLOCK))
    except (tarfile.TarError, zlib.error, EOFError, OSError, ValueError, OverflowError) as error:
        raise UserError(f"shard {path}: truncated or not a tar file ({error}); fetch or write it anew.") from None
    return list(samples.values())


def _lines(file: Path) -> list[str]:
    """Returns the non-empty lines of a text file; none if the file is missing."""
    try:
        text = file.read_text("utf-8-sig")
    except FileNotFoundError:
        return []
    except UnicodeDecodeError:
        raise UserError(f"{file}: not UTF-8 text; save it as UTF-8.") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def __getattr__(name: str) -> Any:
    """Names of version 0.1."""
    from vlmdefend.moved import old_member

    return old_member(__name__, name)
