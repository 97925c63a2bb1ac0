"""Sets on disk for which torchvision has no class, or whose class hides the place of an image or a label."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmdefend.data.class_names import imagenet_names
from vlmdefend.data.folders import image_files, labelled, subfolders
from vlmdefend.errors import UserError


@dataclass(frozen=True)
class LabelledFiles:
    """Image files, their labels, and the names of the classes."""

    paths: list[Path]
    labels: list[int]
    classes: list[str]


def imagenet_all(root: Path, folder: str) -> LabelledFiles:
    """Reads folders named by WordNet id, or by label (``0`` to ``999``, as ImageNet-V2); always all 1,000 classes."""
    names = imagenet_names()
    label_of = {wnid: label for label, wnid in enumerate(names)} | {str(i): i for i in range(len(names))}
    folders = _known_folders(root / folder, label_of)
    paths, positions = labelled(folders)
    return LabelledFiles(paths, [label_of[folders[p].name] for p in positions], list(names.values()))


def imagenet_part(root: Path, folder: str) -> LabelledFiles:
    """Reads folders named by WordNet id; the classes are those that have a folder (ImageNet-A, -R: 200)."""
    names = imagenet_names()
    folders = _known_folders(root / folder, names)
    paths, labels = labelled(folders)
    return LabelledFiles(paths, labels, [names[f.name] for f in folders])


def tiny_imagenet(root: Path, folder: str) -> LabelledFiles:
    """Reads Tiny ImageNet as distributed: ``wnids.txt``, ``words.txt``, ``train/WNID/images/*``, ``val/images/*``.

    Labels follow the sorted WordNet ids. A ``val`` that was sorted into class folders is read too. Names are
    ImageNet's where ImageNet has the class, else the first word of ``words.txt``.
    """
    top, part = root / Path(folder).parent, root / folder
    wnids = sorted(_read(top / "wnids.txt").split())
    written = dict(line.split("\t", 1) for line in _read(top / "words.txt").splitlines() if "\t" in line)
    names = imagenet_names()
    classes = [names.get(wnid) or written.get(wnid, wnid).split(",")[0].strip() for wnid in wnids]
    label_of = {wnid: label for label, wnid in enumerate(wnids)}
    if (part / "val_annotations.txt").is_file() and (part / "images").is_dir():
        rows = [line.split("\t") for line in _read(part / "val_annotations.txt").splitlines()]
        wnid_of = {row[0]: row[1] for row in rows if len(row) > 1}
        paths = image_files(part / "images")
        for path in paths:
            if wnid_of.get(path.name) not in label_of:
                raise UserError(f"{path}: val_annotations.txt gives it no class of wnids.txt; fetch the set again.")
        return LabelledFiles(paths, [label_of[wnid_of[path.name]] for path in paths], classes)
    folders = _known_folders(part, label_of)
    paths, positions = labelled(folders)
    return LabelledFiles(paths, [label_of[folders[p].name] for p in positions], classes)


def caltech101_paths(dataset: Any) -> list[Path]:
    """The files torchvision's Caltech101 opens, by class and number."""
    top = Path(dataset.root) / "101_ObjectCategories"
    return [top / dataset.categories[y] / f"image_{k:04d}.jpg" for y, k in zip(dataset.y, dataset.index, strict=True)]


def caltech256_paths(dataset: Any) -> list[Path]:
    """The files torchvision's Caltech256 opens, by class and number."""
    top = Path(dataset.root) / "256_ObjectCategories"
    return [
        top / dataset.categories[y] / f"{y + 1:03d}_{k:04d}.jpg" for y, k in zip(dataset.y, dataset.index, strict=True)
    ]


def caltech256_name(category: str) -> str:
    """``251.airplanes-101`` -> ``airplanes``."""
    return re.sub(r"^\d+\.|-101$", "", category).replace("-", " ")


def pcam_labels(dataset: Any) -> list[int]:
    """Reads the labels of PCAM's HDF5 file at once; torchvision opens the file twice per image."""
    file = dataset._base_folder / dataset._FILES[dataset._split]["targets"][0]
    with dataset.h5py.File(file) as opened:
        return [int(label) for label in opened["y"][:, 0, 0, 0]]


def _known_folders(top: Path, known: dict[str, Any]) -> list[Path]:
    folders = subfolders(top)
    for folder in folders:
        if folder.name not in known:
            raise UserError(f"{folder}: is no class of this set (WordNet ids such as n01440764); move it elsewhere.")
    if not folders:
        raise UserError(f"{top} has no class folder; expected folders named by WordNet id, such as n01440764.")
    return folders


def _read(file: Path) -> str:
    if not file.is_file():
        raise UserError(f"{file} is missing; it belongs to the set as distributed: unpack the archive again.")
    return file.read_text("utf-8")


def __getattr__(name: str) -> Any:
    """Names of version 0.1."""
    from vlmdefend.moved import old_member

    return old_member(__name__, name)
