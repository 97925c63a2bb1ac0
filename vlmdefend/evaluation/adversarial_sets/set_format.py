"""The files of a saved set: their fields, and how they are written. The folder is described in ``adversarial_set``."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from vlmdefend.evaluation.grid.protocol import Protocol
from vlmdefend.evaluation.store.records import Cell, ImageRow

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
MANIFEST, INDEX, SHEET = "manifest.json", "index.jsonl", "contact_sheet.png"


class IndexRow(ImageRow):
    """One image of the set: what a record says of it, and where its pixels are."""

    number: int  # 0, 1, 2 ... over the set
    file: str
    position: int  # in the file's tensor
    fooled: bool  # right when clean, wrong now
    clean_hash: str  # of the clean image's float32 pixels


class ImageFile(BaseModel):
    """A file of the set."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^(index\.jsonl|images-\d{5,}\.safetensors)$")  # never out of the folder
    size: int  # bytes
    sha256: str

    @classmethod
    def of(cls, name: str, content: bytes) -> ImageFile:
        """The entry of a file with this content."""
        return cls(name=name, size=len(content), sha256=hashlib.sha256(content).hexdigest())


class Manifest(BaseModel):
    """What the set is: enough to score it, to check it and to craft it again."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    format: int = FORMAT
    key: str
    cell: Cell  # with weights_hash, code_hash, norm, eps, attack and its options
    protocol: Protocol
    class_names: tuple[str, ...]
    templates: tuple[str, ...]  # the prompts that the model was asked with
    n: int
    clean_correct: int
    fooled: int
    largest_distance: float  # float64, in the norm of the cell
    ids_hash: str  # of the saved images' ids and labels
    images_hash: str  # of their encoded files, where those may change under the same ids
    index: ImageFile
    images: tuple[ImageFile, ...]
    environment: dict[str, str]

    @property
    def source(self) -> str:
        """``tiny-vit:pgd:steps=10``, ``tiny-vit+jpeg:pgd:steps=10:adaptive``: what was attacked, and how."""
        from vlmdefend.evaluation.statistics.diagnostics import attack_label

        defended = "" if self.cell.defense == "none" else f"+{self.cell.defense}"
        attacker = [] if self.cell.defense == "none" else [self.cell.attacker]
        return ":".join([self.cell.model + defended, *attack_label(self.cell).split(), *attacker])


def manifest_text(manifest: Manifest) -> bytes:
    """The manifest as a file, with a hash of its own that tells when it was edited."""
    data = manifest.model_dump(mode="json")
    return (json.dumps({**data, "sha256": digest(data)}, indent=1, allow_nan=False) + "\n").encode()


def digest(data: dict[str, Any]) -> str:
    """SHA-256 of a JSON object, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def clean_hash(pixels: Tensor) -> str:
    """Of one image, (3, H, W) float32: its shape and its bits."""
    return hashlib.sha256(repr(tuple(pixels.shape)).encode() + pixels.cpu().numpy().tobytes()).hexdigest()[:16]


def write_whole(file: Path, content: bytes) -> None:
    """Write a whole file or none; the writer holds the cell's lock, so what a kill left behind is overwritten."""
    temporary = file.with_name(f".{file.name}.part")
    with temporary.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, file)


def json_lines(rows: Sequence[dict[str, Any]]) -> bytes:
    """One object per line; a line break in an id is escaped."""
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode()
