"""File formats of a saved set: index rows and manifest. The folder is described in ``adversarial_set``."""

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
    """One image of the set: its outcome, and the file and position of its pixels."""

    number: int  # 0, 1, 2 ... over the set
    file: str
    position: int  # in the file's tensor
    fooled: bool  # the clean image was classified correctly, the adversarial one is not
    clean_hash: str  # of the clean image's float32 pixels


class ImageFile(BaseModel):
    """Name, size and hash of one file of images."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^(index\.jsonl|images-\d{5,}\.safetensors)$")  # no path that leaves the folder
    size: int  # bytes
    sha256: str

    @classmethod
    def of(cls, name: str, content: bytes) -> ImageFile:
        """Returns the entry of a file with this content."""
        return cls(name=name, size=len(content), sha256=hashlib.sha256(content).hexdigest())


class Manifest(BaseModel):
    """The description of a set: all that is needed to score it, check it and craft it again."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    format: int = FORMAT
    key: str
    cell: Cell  # with weights_hash, code_hash, norm, eps, attack and its options
    protocol: Protocol
    class_names: tuple[str, ...]
    templates: tuple[str, ...]  # the prompts that the model was scored with
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
        """The attacked pipeline and the attack, as ``tiny-vit+jpeg:pgd:steps=10:adaptive``."""
        from vlmdefend.evaluation.statistics.diagnostics import attack_label

        defended = "" if self.cell.defense == "none" else f"+{self.cell.defense}"
        attacker = [] if self.cell.defense == "none" else [self.cell.attacker]
        return ":".join([self.cell.model + defended, *attack_label(self.cell).split(), *attacker])


def manifest_text(manifest: Manifest) -> bytes:
    """Returns the content of the manifest file, with a hash of itself that reveals an edit."""
    data = manifest.model_dump(mode="json")
    return (json.dumps({**data, "sha256": digest(data)}, indent=1, allow_nan=False) + "\n").encode()


def digest(data: dict[str, Any]) -> str:
    """Returns the SHA-256 of a JSON object, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def clean_hash(pixels: Tensor) -> str:
    """Returns the hash of one (3, H, W) float32 image: its shape and its bits."""
    return hashlib.sha256(repr(tuple(pixels.shape)).encode() + pixels.cpu().numpy().tobytes()).hexdigest()[:16]


def write_whole(file: Path, content: bytes) -> None:
    """Writes a whole file or none; the writer holds the cell's lock, so leftovers of a kill are overwritten."""
    temporary = file.with_name(f".{file.name}.part")
    with temporary.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, file)


def json_lines(rows: Sequence[dict[str, Any]]) -> bytes:
    """Returns one JSON object per line; a line break in an id is escaped."""
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode()
