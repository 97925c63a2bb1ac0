from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image

from vlmdefend.data.base import BadImage
from vlmdefend.data.transforms import PixelTransform
from vlmdefend.errors import UserError


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(37, 53), (20, 20), (80, 31), (1, 1), (32, 32)])
def test_pixels_equal_open_clips_preprocessing_without_normalisation_bit_for_bit(
    size: tuple[int, int], interpolation: Literal["bicubic", "bilinear"]
) -> None:
    from open_clip.transform import image_transform

    theirs = image_transform(32, is_train=False, mean=(0.0,) * 3, std=(1.0,) * 3, interpolation=interpolation)
    image = picture(*size)
    ours = PixelTransform(32, interpolation)(image)
    assert ours.shape == (3, 32, 32)
    assert torch.equal(ours, theirs(image))


def test_native_pixels_are_the_levels_over_255_exactly() -> None:
    image = picture(9, 5)
    pixels = PixelTransform(None)(image)
    levels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert pixels.shape == (3, 5, 9)
    assert pixels.dtype == torch.float32
    assert pixels.is_contiguous()
    assert torch.equal(pixels, levels.float() / 255)
    assert torch.equal((pixels * 255).round().to(torch.uint8), levels)


def test_a_strip_too_long_to_resize_is_a_bad_image_and_not_a_full_memory() -> None:
    with pytest.raises(BadImage, match="30000 x 1 pixels are too long and thin"):
        PixelTransform(224)(Image.new("RGB", (30000, 1)))


@pytest.mark.parametrize("arguments", [(0, "bicubic"), (224, "nearest")])
def test_a_size_or_interpolation_that_means_nothing_is_refused(arguments: tuple[int, Literal["bicubic"]]) -> None:
    with pytest.raises(UserError, match="give"):
        PixelTransform(*arguments)
