from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from PIL import Image

from vlmdefend.data.base import BadImage, ImageSet
from vlmdefend.data.loader import load_batch
from vlmdefend.data.transforms import PixelTransform
from vlmdefend.errors import UserError

Toy = Callable[..., ImageSet]
NATIVE = PixelTransform(None)


def with_bad(images: ImageSet, bad: set[int]) -> ImageSet:
    def read(i: int) -> Image.Image:
        if i in bad:
            time.sleep(0.02 if i == min(bad) else 0)  # the first bad image fails last
            raise BadImage(f"{images.ids[i]}: the file is empty.")
        return images.read(i)

    return replace(images, read=read)


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_order_and_pixels_do_not_depend_on_the_number_of_threads(toy_set: Toy, threads: int) -> None:
    images = toy_set([i % 3 for i in range(50)])
    index = [40, 3, 3, 17, 0]
    batch, skipped = load_batch(images, index, NATIVE, skip_bad=False, threads=threads)
    assert skipped == []
    assert batch.ids == [images.ids[i] for i in index]
    assert (batch.images[:, 0, 0, 0] * 255).round().tolist() == index
    assert batch.labels.tolist() == [i % 3 for i in index]
    assert batch.images.dtype == torch.float32
    assert batch.labels.dtype == torch.int64


def test_threads_decode_at_the_same_time(toy_set: Toy) -> None:
    meeting = threading.Barrier(2, timeout=5)

    def read(i: int) -> Image.Image:
        meeting.wait()
        return Image.new("RGB", (2, 2))

    load_batch(replace(toy_set([0, 0]), read=read), [0, 1], NATIVE, skip_bad=False, threads=2)


@pytest.mark.parametrize("threads", [1, 4])
def test_the_first_bad_image_in_order_is_raised(toy_set: Toy, threads: int) -> None:
    images = with_bad(toy_set([0] * 8), {2, 5})
    with pytest.raises(BadImage, match=r"^id0002: "):
        load_batch(images, range(8), NATIVE, skip_bad=False, threads=threads)


def test_skip_bad_leaves_bad_images_out_and_says_which_and_why(toy_set: Toy) -> None:
    images = with_bad(toy_set([0, 1, 2, 3]), {1, 3})
    batch, skipped = load_batch(images, range(4), NATIVE, skip_bad=True)
    assert batch.ids == ["id0000", "id0002"]
    assert batch.labels.tolist() == [0, 2]
    assert skipped == [("id0001", "id0001: the file is empty."), ("id0003", "id0003: the file is empty.")]


def test_a_batch_of_bad_images_only_is_empty(toy_set: Toy) -> None:
    batch, skipped = load_batch(with_bad(toy_set([0, 1]), {0, 1}), [0, 1], NATIVE, skip_bad=True)
    assert batch.images.shape == (0, 3, 0, 0)
    assert batch.labels.shape == (0,)
    assert len(skipped) == 2


def test_an_image_that_cannot_be_resized_is_named(toy_set: Toy) -> None:
    with pytest.raises(BadImage, match=r"^id0000: 40000 x 1 pixels"):
        load_batch(toy_set([0], size=(40000, 1)), [0], PixelTransform(224), skip_bad=False)


def test_native_images_of_two_sizes_are_one_sentence_with_both(toy_set: Toy) -> None:
    images = toy_set([0, 0])
    mixed = replace(images, read=lambda i: Image.new("RGB", (4 + i, 3)))
    with pytest.raises(UserError, match=r"id0000 has 4 x 3 pixels and id0001 has 5 x 3"):
        load_batch(mixed, [0, 1], NATIVE, skip_bad=True)


def test_another_error_than_a_bad_image_is_not_swallowed(toy_set: Toy) -> None:
    def read(i: int) -> Image.Image:
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        load_batch(replace(toy_set([0]), read=read), [0], NATIVE, skip_bad=True)
