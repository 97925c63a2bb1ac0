"""Training and test images of the embedded sets as tensors, and the small augmentation used in training.

Every image takes the way that it takes in deployment: RGB, resized to 32 pixels with bicubic
interpolation by PIL, so that a model is trained on what it will be shown.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks.assets.packages import has_fashion_archive, read_fashion
from benchmarks.assets.shards import read_lines, read_split

SETS = (
    "fashion",
    "mnist",
    "uci-digits",
    "emoji-google",
    "emoji-twitter",
    "emoji-fluent",
    "emoji-openmoji",
    "emoji-sketch",
)
SIZE = 32


@dataclass(frozen=True)
class ImageSet:
    """Images (N, 3, 32, 32) uint8, class indices (N,) int64 (-1: of no class), and names where there are any."""

    pixels: Tensor
    labels: Tensor
    names: list[str | None]
    classnames: list[str]
    templates: list[str]

    def labelled(self) -> tuple[Tensor, Tensor]:
        """Images in [0, 1] and labels of the samples that belong to a class."""
        chosen = self.labels >= 0
        return self.pixels[chosen].float() / 255, self.labels[chosen]


def load_set(assets: Path, name: str, split: str) -> ImageSet:
    """One split of one embedded set."""
    samples = read_split(assets / name, split)
    return ImageSet(
        pixels=as_pixels(sample.open() for sample in samples),
        labels=torch.tensor([-1 if sample.label is None else sample.label for sample in samples]),
        names=[sample.name for sample in samples],
        classnames=read_lines(assets / name / "classnames.txt"),
        templates=read_lines(assets / name / "zeroshot_classification_templates.txt"),
    )


def load_training_set(assets: Path, name: str, packages: Path | None) -> ImageSet:
    """The training split, or for `fashion` all 60,000 training images where the Debian package is there."""
    if name != "fashion" or packages is None or not has_fashion_archive(packages):
        return load_set(assets, name, "train")
    images, labels = read_fashion(packages)["train"]
    return ImageSet(
        pixels=as_pixels(Image.fromarray(image) for image in images),
        labels=torch.from_numpy(labels.astype(np.int64)),
        names=[None] * len(images),
        classnames=read_lines(assets / name / "classnames.txt"),
        templates=read_lines(assets / name / "zeroshot_classification_templates.txt"),
    )


def as_pixels(images: Iterable[Image.Image]) -> Tensor:
    """Pictures as one tensor (N, 3, 32, 32) uint8."""
    rows = [np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for image in images]
    return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).contiguous()


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift by up to 2 pixels, scale by up to 10 %, turn by up to 8 degrees; a quarter stay as they are.

    Args:
        images: (B, 3, 32, 32) in [0, 1].
        generator: where the random numbers come from.
    """
    draw = torch.rand(4, len(images), generator=generator) * 2 - 1  # (4, B) in [-1, 1]
    moved = torch.rand(len(images), generator=generator) >= 0.25
    shift_x, shift_y = draw[:2] * (2 * 2 / SIZE) * moved
    scale = 1 + 0.1 * draw[2] * moved
    angle = math.radians(8) * draw[3] * moved
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    matrix = torch.stack([cosine, -sine, shift_x, sine, cosine, shift_y], 1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
