"""The zero-shot sets of the papers, read from a local copy through torchvision."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from vlmdefend.data import class_names, layouts
from vlmdefend.data.base import ImageSet, ListedDataset, Source, data_root
from vlmdefend.data.class_names import underscores
from vlmdefend.data.folders import printable
from vlmdefend.data.images import decode, to_rgb
from vlmdefend.data.prompts import templates_for
from vlmdefend.data.sources import SOURCES
from vlmdefend.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from PIL import Image

BY_TRAIN: Mapping[str, Mapping[str, Any]] = {"test": {"train": False}, "train": {"train": True}}
BY_SPLIT: Mapping[str, Mapping[str, Any]] = {"test": {"split": "test"}, "train": {"split": "train"}}
BY_SPLIT_VAL: Mapping[str, Mapping[str, Any]] = {**BY_SPLIT, "val": {"split": "val"}}
WHOLE: Mapping[str, Mapping[str, Any]] = {"test": {}}
"""No official split: every image is in ``test``, as in the papers, and ``train`` is refused."""


def _words(dataset: Any) -> list[str]:
    return [underscores(name) for name in dataset.classes]


def _always(names: Sequence[str]) -> Callable[[Any], Sequence[str]]:
    return lambda dataset: names


def _second(attribute: str) -> Callable[[Any], list[int]]:
    return lambda dataset: [label for _, label in getattr(dataset, attribute)]


def _first(attribute: str) -> Callable[[Any], list[str]]:
    return lambda dataset: [path for path, _ in getattr(dataset, attribute)]


@dataclass(frozen=True)
class TorchvisionSet:
    """One set: its torchvision class, and where its names, files and labels are found."""

    name: str
    dataset: str  # the class in torchvision.datasets
    classes: int
    expects: str  # what has to lie under the root, with the folder names torchvision gives it
    summary: str
    splits: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: BY_SPLIT)  # ours -> its arguments
    class_names: Callable[[Any], Sequence[str]] = attrgetter("classes")
    labels: Callable[[Any], Sequence[int]] = attrgetter("_labels")
    paths: Callable[[Any], Sequence[str | Path]] | None = None  # None: the images lie in arrays
    build: Callable[..., Any] | None = None  # reads the layout in place of torchvision's class
    folder: str = ""  # torchvision's root, under ours
    fetch: str = ""  # how to get it, where torchvision does not download it


def _distributed(
    name: str,
    classes: int,
    build: Callable[[Path, str], layouts.LabelledFiles],
    folder: str,
    *,
    summary: str,
    fetch: str,
    **splits: str,
) -> TorchvisionSet:
    """Returns a row for a set read as it is distributed; ``test`` is its ``val``, or all of it."""
    places = {split: {"folder": folder + below} for split, below in {"test": splits.get("val", ""), **splits}.items()}
    labels, paths = attrgetter("labels"), attrgetter("paths")
    return TorchvisionSet(
        name, "", classes, folder, summary, places, labels=labels, paths=paths, build=build, fetch=fetch
    )


TABLE = (
    TorchvisionSet(
        "cifar10", "CIFAR10", 10, "cifar-10-batches-py", "32x32 photographs (Krizhevsky 2009)",
        splits=BY_TRAIN, class_names=_words, labels=attrgetter("targets"),
    ),
    TorchvisionSet(
        "cifar100", "CIFAR100", 100, "cifar-100-python", "32x32 photographs (Krizhevsky 2009)",
        splits=BY_TRAIN, class_names=_words, labels=attrgetter("targets"),
    ),
    TorchvisionSet("stl10", "STL10", 10, "stl10_binary", "96x96 photos (Coates 2011)", labels=attrgetter("labels")),
    TorchvisionSet(
        "sun397", "SUN397", 397, "SUN397", "scenes (Xiao 2010); no official split in torchvision, all are test",
        splits=WHOLE, class_names=_words, paths=attrgetter("_image_files"),
    ),
    TorchvisionSet(
        "food101", "Food101", 101, "food-101", "dishes (Bossard 2014)",
        class_names=_words, paths=attrgetter("_image_files"),
    ),
    TorchvisionSet(
        "oxford-pets", "OxfordIIITPet", 37, "oxford-iiit-pet", "cats and dogs by breed (Parkhi 2012)",
        splits={"test": {"split": "test"}, "train": {"split": "trainval"}}, paths=attrgetter("_images"),
    ),
    TorchvisionSet(
        "flowers102", "Flowers102", 102, "flowers-102", "flowers (Nilsback 2008)",
        splits=BY_SPLIT_VAL, class_names=_always(class_names.FLOWERS102), paths=attrgetter("_image_files"),
    ),
    TorchvisionSet(
        "dtd", "DTD", 47, "dtd/dtd", "textures (Cimpoi 2014), partition 1",
        splits=BY_SPLIT_VAL, class_names=_words, paths=attrgetter("_image_files"),
    ),
    TorchvisionSet(
        "eurosat", "EuroSAT", 10, "eurosat/2750", "satellite images (Helber 2019); no official split, all are test",
        splits=WHOLE, class_names=lambda d: [class_names.EUROSAT.get(c, c) for c in d.classes],
        labels=_second("samples"), paths=_first("samples"),
    ),
    TorchvisionSet(
        "fgvc-aircraft", "FGVCAircraft", 100, "fgvc-aircraft-2013b", "aircraft by variant (Maji 2013)",
        splits={**BY_SPLIT_VAL, "trainval": {"split": "trainval"}}, paths=attrgetter("_image_files"),
    ),
    TorchvisionSet(
        "caltech101", "Caltech101", 101, "caltech101/101_ObjectCategories",
        "objects (Fei-Fei 2004), without the background class; no official split, all are test",
        splits=WHOLE, class_names=lambda d: [class_names.CALTECH101.get(c, underscores(c)) for c in d.categories],
        labels=attrgetter("y"), paths=layouts.caltech101_paths,
    ),
    TorchvisionSet(
        "caltech256", "Caltech256", 257, "caltech256/256_ObjectCategories",
        "objects (Griffin 2007), with the clutter class; no official split, all are test",
        splits=WHOLE, class_names=lambda d: [layouts.caltech256_name(c) for c in d.categories],
        labels=attrgetter("y"), paths=layouts.caltech256_paths,
    ),
    TorchvisionSet(
        "stanford-cars", "StanfordCars", 196, "stanford_cars/devkit", "cars by model and year (Krause 2013)",
        labels=_second("_samples"), paths=_first("_samples"),
        fetch="its first home is gone, so get a copy in that layout (devkit, cars_train, cars_test, "
        "cars_test_annos_withlabels.mat), or webdataset shards and wds:PATH",
    ),
    TorchvisionSet(
        "pcam", "PCAM", 2, "pcam", "lymph node tissue, with or without tumour (Veeling 2018); needs h5py",
        splits=BY_SPLIT_VAL, class_names=_always(class_names.PCAM), labels=layouts.pcam_labels,
    ),
    TorchvisionSet(
        "country211", "Country211", 211, "country211", "photographs by country (Radford 2021)",
        splits={**BY_SPLIT, "val": {"split": "valid"}},
        class_names=lambda d: [class_names.COUNTRY211.get(c, c) for c in d.classes],
        labels=_second("samples"), paths=_first("samples"),
    ),
    TorchvisionSet(
        "svhn", "SVHN", 10, "svhn", "house numbers (Netzer 2011)",
        class_names=_always(class_names.DIGIT_WORDS), labels=attrgetter("labels"), folder="svhn",
    ),
    TorchvisionSet(
        "gtsrb", "GTSRB", 43, "gtsrb", "German traffic signs (Stallkamp 2012)",
        class_names=_always(class_names.GTSRB), labels=_second("_samples"), paths=_first("_samples"),
    ),
    TorchvisionSet(
        "fashion-mnist", "FashionMNIST", 10, "FashionMNIST/raw", "the full Fashion-MNIST (Xiao 2017)",
        splits=BY_TRAIN, labels=attrgetter("targets"),
    ),
    TorchvisionSet(
        "mnist-full", "MNIST", 10, "MNIST/raw", "the full MNIST (LeCun 1998)",
        splits=BY_TRAIN, class_names=_always(class_names.DIGITS), labels=attrgetter("targets"),
    ),
    _distributed(
        "tiny-imagenet", 200, layouts.tiny_imagenet, "tiny-imagenet-200", val="/val", train="/train",
        summary="200 classes of ImageNet at 64x64; test is its val", fetch="unpack tiny-imagenet-200.zip there",
    ),
    _distributed(
        "imagenet", 1000, layouts.imagenet_all, "imagenet", val="/val", train="/train",
        summary="ImageNet-1k (Russakovsky 2015); test is its val",
        fetch="put the ILSVRC2012 archives there and run once "
        "`torchvision.datasets.ImageNet({root}, split='val')`, which unpacks them into val/n01440764/ ...",
    ),
    _distributed(
        "imagenet-v2", 1000, layouts.imagenet_all, "imagenetv2-matched-frequency-format-val",
        summary="a second test set for ImageNet (Recht 2019), matched frequency",
        fetch="unpack imagenetv2-matched-frequency.tar.gz there",
    ),
    _distributed(
        "imagenet-a", 200, layouts.imagenet_part, "imagenet-a",
        summary="natural adversarial examples, 200 classes (Hendrycks 2021)", fetch="unpack imagenet-a.tar there",
    ),
    _distributed(
        "imagenet-r", 200, layouts.imagenet_part, "imagenet-r",
        summary="renditions of ImageNet classes, 200 of them (Hendrycks 2021)", fetch="unpack imagenet-r.tar there",
    ),
    _distributed(
        "imagenet-sketch", 1000, layouts.imagenet_all, "sketch",
        summary="sketches of ImageNet classes (Wang 2019)", fetch="unpack ImageNet-Sketch.zip there",
    ),
)  # fmt: skip


@SOURCES.register
class TorchvisionSets(Source):
    """Sets in the layout torchvision downloads, or, where it has none, in the layout they are distributed in.

    Nothing is downloaded. Files are decoded as torchvision does (no EXIF rotation), because published numbers were
    taken so. CIFAR's batches are pickles, which is their documented format: torchvision unpickles them after
    checking their MD5 sums.
    """

    name: ClassVar[str] = "torchvision_sets"

    def listed(self) -> list[ListedDataset]:
        """The rows of the table."""
        return [ListedDataset(row.name, row.summary, row.classes, "torchvision") for row in TABLE]

    def open(self, name: str, split: str, root: Path | None) -> ImageSet:
        """Read one set under ``root``.

        Raises:
            UserError: no such split; the files are missing (where, and how to get them), damaged or incomplete.
        """
        row = next(row for row in TABLE if row.name == name)
        top = data_root(root)
        dataset = _opened(row, split, top)
        names = tuple(row.class_names(dataset))
        if len(names) != row.classes:
            raise UserError(
                f"{name}: {top / row.expects} has {len(names)} classes, the set has {row.classes}; this copy is "
                "not whole, fetch it again (or read a part of it with folder:PATH)."
            )
        ids, labels, read = _in_files(row, dataset, top) if row.paths else _in_arrays(row, dataset, split)
        return ImageSet(name, split, names, templates_for(name), tuple(ids), tuple(labels), read)


Read = Callable[[int], "Image.Image"]


def _in_arrays(row: TorchvisionSet, dataset: Any, split: str) -> tuple[list[str], list[int], Read]:
    labels = [int(label) for label in row.labels(dataset)]
    return [f"{split}/{i:06d}" for i in range(len(labels))], labels, lambda i: to_rgb(dataset[i][0])


def _in_files(row: TorchvisionSet, dataset: Any, top: Path) -> tuple[list[str], list[int], Read]:
    assert row.paths is not None
    # sorted, because the order in which some classes list files is the file system's
    files = sorted(zip(map(str, row.paths(dataset)), map(int, row.labels(dataset)), strict=True))
    ids = [printable(Path(path), top) for path, _ in files]
    return ids, [label for _, label in files], lambda i: decode(Path(files[i][0]), files[i][0], upright=False)


def _opened(row: TorchvisionSet, split: str, top: Path) -> Any:
    """Opens the data set object of a row: torchvision's, or one of :mod:`vlmdefend.data.layouts`."""
    if split not in row.splits:
        hint = "It has no official split: every image is in test." if row.splits is WHOLE else ""
        raise did_you_mean(f"split of {row.name}", split, list(row.splits), hint=hint)
    arguments = dict(row.splits[split])
    where = top / arguments.get("folder", row.expects)
    if not where.exists():
        raise UserError(_how_to_get(row, top, where, arguments))
    if row.build is not None:
        return row.build(top, **arguments)
    try:
        return getattr(importlib.import_module("torchvision.datasets"), row.dataset)(str(top / row.folder), **arguments)
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        if "h5py" in str(error):
            raise UserError(f"{row.name}: its files are HDF5; `pip install h5py` to read them.") from None
        raise UserError(
            f"{row.name}: torchvision cannot read {where} ({error}). {_how_to_get(row, top, where, arguments)}"
        ) from None


def _how_to_get(row: TorchvisionSet, top: Path, where: Path, arguments: Mapping[str, Any]) -> str:
    folder = top / row.folder
    given = "".join(f", {key}={value!r}" for key, value in arguments.items())
    line = f"`torchvision.datasets.{row.dataset}({str(folder)!r}{given}, download=True)`"
    how = row.fetch.format(root=repr(str(folder / row.expects))) or f"download it with {line}"
    return f"{row.name} is expected in {where}: {how}, or set $VLMDEFEND_DATA to the folder that holds {row.expects}."


def __getattr__(name: str) -> Any:
    """Names of version 0.1."""
    from vlmdefend.moved import old_member

    return old_member(__name__, name)
