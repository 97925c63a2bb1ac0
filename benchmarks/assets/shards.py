"""Write and read image sets in CLIP_benchmark's webdataset layout, the same bytes every time.

    SET/classnames.txt
    SET/zeroshot_classification_templates.txt
    SET/SPLIT/nshards.txt
    SET/SPLIT/0.tar.gz          KEY.png or KEY.webp, KEY.cls (a class index), KEY.txt (a name)

Owner, group and time of every member are zero and keys are sorted, so that a rebuilt shard can be
compared with the committed one byte for byte.
"""

from __future__ import annotations

import gzip
import io
import tarfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from benchmarks.assets.packages import AssetError


@dataclass(frozen=True)
class Sample:
    """One image: encoded bytes, their format ("png" | "webp"), a class index and a name where it has them."""

    key: str
    image: bytes
    format: str
    label: int | None
    name: str | None = None

    def open(self) -> Image.Image:
        """The image as RGB."""
        return Image.open(io.BytesIO(self.image)).convert("RGB")

    def members(self) -> list[tuple[str, bytes]]:
        """File names and contents of this sample in a shard."""
        files = [(f"{self.key}.{self.format}", self.image)]
        if self.label is not None:
            files.append((f"{self.key}.cls", str(self.label).encode("ascii")))
        if self.name is not None:
            files.append((f"{self.key}.txt", self.name.encode()))
        return files


def write_shard(path: Path, samples: Iterable[Sample]) -> None:
    """A gzipped tar of `samples`, sorted by key, free of times and owners."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        path.open("wb") as file,
        gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=file, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for sample in sorted(samples, key=lambda sample: sample.key):
            for name, content in sample.members():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def write_set(
    folder: Path, classnames: Sequence[str], templates: Sequence[str], splits: dict[str, list[Sample]]
) -> None:
    """One image set in CLIP_benchmark's layout, one shard a split."""
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / "classnames.txt", classnames)
    write_lines(folder / "zeroshot_classification_templates.txt", templates)
    for split, samples in splits.items():
        write_shard(folder / split / "0.tar.gz", samples)
        write_lines(folder / split / "nshards.txt", ["1"])


def write_lines(path: Path, lines: Sequence[str]) -> None:
    """A text file with one line for each of `lines`."""
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def read_lines(path: Path) -> list[str]:
    """The lines of a text file of a set.

    Raises:
        AssetError: there is no such file.
    """
    if not path.exists():
        raise AssetError(f"'{path}' is missing: run 'make_assets.py images' first.")
    return path.read_text(encoding="utf-8").splitlines()


def read_split(folder: Path, split: str) -> list[Sample]:
    """All samples of one split, in the order of their keys."""
    shards = int(read_lines(folder / split / "nshards.txt")[0])
    files: dict[str, dict[str, bytes]] = defaultdict(dict)
    for shard in range(shards):
        with tarfile.open(folder / split / f"{shard}.tar.gz") as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                file = tar.extractfile(member)
                if file is not None:
                    files[key][extension] = file.read()
    return [as_sample(key, parts) for key, parts in sorted(files.items())]


def as_sample(key: str, parts: dict[str, bytes]) -> Sample:
    """The sample that the members `parts` ({extension: content}) make up."""
    extension = "png" if "png" in parts else "webp"
    label = int(parts["cls"]) if "cls" in parts else None
    name = parts["txt"].decode() if "txt" in parts else None
    return Sample(key, parts[extension], extension, label, name)
