"""Augmentation of training images: a new random crop in every epoch, as few-shot methods are published with."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from vlmdefend.defenses.views.crops import augmented_views
from vlmdefend.rng import ImageRng
from vlmdefend.training.settings.train_settings import Augment


def crop_and_flip(images: Tensor, rng: ImageRng) -> Tensor:
    """Returns a random resized crop of each image, mirrored with probability 1/2.

    As in APT and AdvCLIP-LoRA: area share from 0.08 to 1, aspect ratio from 3/4 to 4/3. They crop the image file and
    resize bicubically; here the image is cropped at its training size and resized bilinearly, so that images are
    decoded once.

    Args:
        images: (B, 3, H, W) in [0, 1]; the result has the same shape and range.
        rng: draws for each image by its id.
    """
    return augmented_views(images, rng, 2)[:, 1].clamp(0.0, 1.0)


AUGMENTATIONS: dict[Augment, Callable[[Tensor, ImageRng], Tensor] | None] = {"none": None, "crop-flip": crop_and_flip}
