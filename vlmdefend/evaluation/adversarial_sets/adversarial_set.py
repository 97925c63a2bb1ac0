"""A saved set of adversarial images: the files of its folder, read and checked.

``vlmdefend attack --out DIR`` writes

* ``images-00000.safetensors`` ...: tensor ``images`` (N, 3, H, W) float32 in [0, 1], the bits that were scored;
* ``index.jsonl``: one JSON object per image, in the order of the images: the fields of :class:`IndexRow`;
  ``index.parquet`` holds the same where pyarrow is installed;
* ``manifest.json``, written last: the fields of :class:`Manifest`: what was attacked, by what, within which threat,
  and the SHA-256 of every file;
* ``cells/KEY``: the record of the attack, so that DIR is also a run folder for ``vlmdefend report``;
* ``contact_sheet.png``, and with ``--png`` the folder ``png`` (see :mod:`vlmdefend.evaluation.adversarial_sets.png`).

File names never contain an image id, since an id may hold any character: ``number`` counts the images, ``file`` and
``position`` locate the pixels. The clean images are not in the set; they are read from the data set again, and the
hash of their pixels shows whether they are the same. Nothing in the set is code, so any tool can read it::

    rows = [json.loads(line) for line in open("DIR/index.jsonl")]
    images = load_file(f"DIR/{rows[0]['file']}")["images"]  # safetensors.torch, safetensors.numpy ...
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from vlmdefend.data import load_dataset
from vlmdefend.data.base import ImageSet
from vlmdefend.errors import UserError
from vlmdefend.evaluation.adversarial_sets.set_format import (
    FORMAT,
    INDEX,
    MANIFEST,
    ImageFile,
    IndexRow,
    Manifest,
    digest,
)
from vlmdefend.types import Threat

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class AdversarialSet:
    """A finished set; pixels are read, and checked against the manifest, on demand."""

    folder: Path
    hash: str  # of the manifest, which holds the hash of every other file
    manifest: Manifest
    rows: tuple[IndexRow, ...]
    _recent: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def open(cls, folder: str | Path) -> AdversarialSet:
        """Reads manifest and index; the image files must exist with the sizes in the manifest.

        Raises:
            UserError: no set, an unfinished one, one of a newer format, or one that was cut off or edited.
        """
        place = Path(folder).expanduser()
        if not place.is_dir():
            raise UserError(f"--adversarial {folder}: no such folder; give the --out folder of `vlmdefend attack`.")
        manifest, set_hash = _read_manifest(place)
        lines = _read_checked(place, manifest.index)
        try:
            rows = tuple(IndexRow.model_validate_json(line) for line in lines.removesuffix(b"\n").split(b"\n"))
        except ValidationError:
            raise _damaged_error(place / INDEX) from None
        if len(rows) != manifest.n or {row.file for row in rows} != {file.name for file in manifest.images}:
            raise _damaged_error(place / INDEX)
        for file in manifest.images:
            if not (place / file.name).is_file() or (place / file.name).stat().st_size != file.size:
                raise _damaged_error(place / file.name)
        return cls(place, set_hash[:16], manifest, rows)

    @property
    def threat(self) -> Threat:
        """The threat model that the images were crafted under."""
        return Threat(self.manifest.cell.norm, self.manifest.cell.eps)

    def pixels(self, file: str) -> Tensor:
        """Returns (N, 3, H, W) float32: the images of one file, in the order of their positions.

        Raises:
            UserError: the file is not the one that was written.
        """
        if file not in self._recent:
            from safetensors.torch import load

            (entry,) = [known for known in self.manifest.images if known.name == file]
            found: Tensor = load(_read_checked(self.folder, entry))["images"]
            while len(self._recent) > 1:  # a batch may lie across two files
                self._recent.pop(next(iter(self._recent)))
            self._recent[file] = found
        return self._recent[file]

    def images(self, rows: Sequence[IndexRow]) -> Tensor:
        """Returns (B, 3, H, W) float32 images of these rows, which must be of one size.

        Raises:
            UserError: a file is not the one that was written.
        """
        import torch

        return torch.stack([self.pixels(row.file)[row.position] for row in rows])

    def clean(self, name: str | None = None, split: str | None = None, root: Path | None = None) -> ImageSet:
        """Returns the clean images, in the order of the rows.

        Args:
            name: the data set, if its name differs from the one used when the set was crafted.
            split: its split.
            root: the folder of downloaded data sets.

        Raises:
            UserError: the data set is not here, lacks an image, or has changed.
        """
        cell = self.manifest.cell
        images = load_dataset(name or cell.dataset, split or cell.split, root=root)
        place = {image: i for i, image in enumerate(images.ids)}
        if missing := [row.id for row in self.rows if row.id not in place]:
            raise UserError(
                f"{self.folder}: {len(missing)} of its {len(self.rows)} images, {missing[0]!r} for one, are not in "
                f"{images.name} ({images.split}); it was crafted on {cell.dataset} ({cell.split}), give that --dataset."
            )
        images = images.select([place[row.id] for row in self.rows])
        if images.ids_hash != self.manifest.ids_hash:
            raise UserError(
                f"{self.folder}: its images have other labels in {images.name} ({images.split}); give the --dataset "
                f"that it was crafted on, {cell.dataset} ({cell.split})."
            )
        if images.content_hash() != self.manifest.images_hash:
            raise UserError(
                f"{self.folder}: the image files of {images.name} ({images.split}) have changed since it was crafted; "
                "craft it again with `vlmdefend attack` in another --out."
            )
        return replace(images, class_names=self.manifest.class_names)


def _read_checked(folder: Path, file: ImageFile) -> bytes:
    """Returns the content of a file whose SHA-256 must be the one in the manifest."""
    try:
        content = (folder / file.name).read_bytes()
    except OSError:
        raise _damaged_error(folder / file.name) from None
    if hashlib.sha256(content).hexdigest() != file.sha256:
        raise _damaged_error(folder / file.name)
    return content


def _read_manifest(folder: Path) -> tuple[Manifest, str]:
    """Returns the checked manifest of a folder and the SHA-256 that it states for itself."""
    file = folder / MANIFEST
    if not file.exists():
        begun = next(folder.glob("cells/*/partial.jsonl"), None) is not None
        advice = (
            "run the same `vlmdefend attack` command again to finish it" if begun else "give the --out folder of a set"
        )
        what = "is half crafted" if begun else "holds no set of `vlmdefend attack`"
        raise UserError(f"--adversarial {folder}: {what} (there is no {MANIFEST}); {advice}.")
    try:
        data = json.loads(file.read_bytes())
        version = data.get("format") if isinstance(data, dict) else None
        if isinstance(version, int) and version > FORMAT:
            raise UserError(
                f"{file}: has format {version}, this vlmdefend reads up to {FORMAT}; upgrade vlmdefend to read it."
            )
        if digest({key: value for key, value in data.items() if key != "sha256"}) != data.get("sha256"):
            raise _damaged_error(file)
        return Manifest.model_validate({key: value for key, value in data.items() if key != "sha256"}), data["sha256"]
    except (OSError, ValueError, AttributeError, TypeError):  # a ValidationError is a ValueError
        raise _damaged_error(file) from None


def _damaged_error(file: Path) -> UserError:
    """Returns the error for a file that is missing, cut off or edited."""
    return UserError(
        f"{file}: is not what `vlmdefend attack` wrote (missing, cut off or edited); delete the folder {file.parent} "
        "and craft the set again."
    )
