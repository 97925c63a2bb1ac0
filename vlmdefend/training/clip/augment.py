"""Training images as another crop in every epoch: what few-shot methods are published with."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from vlmdefend.defenses.views.views import augmented_views
from vlmdefend.rng import ImageRng
from vlmdefend.training.settings.train_settings import Augment


def crop_and_flip(images: Tensor, rng: ImageRng) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> the same shape: a random resized crop of each image, every other one mirrored.

    As APT and AdvCLIP-LoRA train: a share of the area in 0.08 to 1, aspect ratio in 3/4 to 4/3. Theirs is cut from the
    file and bicubic; this one is cut from the image at the size that it is trained at, bilinear, so that the images
    are decoded once. The draws are each image's own.
    """
    return augmented_views(images, rng, 2)[:, 1].clamp(0.0, 1.0)


AUGMENTATIONS: dict[Augment, Callable[[Tensor, ImageRng], Tensor] | None] = {"none": None, "crop-flip": crop_and_flip}
