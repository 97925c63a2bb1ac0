"""What is held out, the order of epochs, and pixels that a cache must not change."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from PIL import Image

from tests.training.conftest import CLASSES, SIZE, image_set
from vlmdefend.data.base import BadImage
from vlmdefend.data.transforms import PixelTransform
from vlmdefend.errors import UserError
from vlmdefend.training.loop.data import TrainingImages, batches, epoch_order, hold_out
from vlmdefend.training.loop.processes import Processes


def test_what_is_held_out_is_balanced_fixed_and_never_trained_on() -> None:
    images = image_set(60)
    train, held = hold_out(images, 12, seed=0)
    assert Counter(held.labels) == dict.fromkeys(range(len(CLASSES)), 2)
    assert not set(train.ids) & set(held.ids)
    assert set(train.ids) | set(held.ids) == set(images.ids)
    assert hold_out(images, 12, seed=0)[1].ids == held.ids
    assert hold_out(images, 12, seed=1)[1].ids != held.ids


def test_holding_out_everything_is_refused_and_nothing_is_nothing() -> None:
    with pytest.raises(UserError, match="--held-out 60: dataset noise has 60 training images"):
        hold_out(image_set(60), 60, seed=0)
    train, held = hold_out(image_set(6), 0, seed=0)
    assert (len(train), len(held)) == (6, 0)


def test_an_epochs_order_is_a_permutation_fixed_by_seed_and_epoch() -> None:
    order = epoch_order(100, 0, "a/0")
    assert sorted(order) == list(range(100))
    assert order == epoch_order(100, 0, "a/0")
    assert len({tuple(epoch_order(100, *which)) for which in ((0, "a/0"), (0, "a/1"), (0, "b/0"), (1, "a/0"))}) == 4


def test_the_last_batch_may_be_smaller_and_is_kept() -> None:
    assert batches(range(10), 4) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_the_shares_of_the_processes_make_up_the_batch() -> None:
    processes = Processes("cpu")
    for count, size in ((2, 8), (3, 8), (4, 2)):
        shares = []
        for rank in range(count):
            processes.rank, processes.count = rank, count
            shares.append(processes.share(list(range(size))))
        assert [i for share in shares for i in share] == list(range(size))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("cache_bytes", [0, 3 * SIZE * SIZE * 5, 10**9])
def test_a_cached_batch_has_the_bits_of_a_decoded_one(cache_bytes: int) -> None:
    reader = TrainingImages(image_set(8), PixelTransform(SIZE), cache_bytes=cache_bytes)
    first = [reader.batch(index) for index in ([3, 1, 7], [0, 1, 2])]
    again = [reader.batch(index) for index in ([3, 1, 7], [0, 1, 2])]
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one.images, two.images)
        assert one.ids == two.ids
        assert torch.equal(one.labels, two.labels)


def test_the_cache_holds_no_more_than_it_may() -> None:
    reader = TrainingImages(image_set(8), PixelTransform(SIZE), cache_bytes=3 * SIZE * SIZE * 5)
    reader.batch(range(8))
    assert len(reader._levels) == 5


def test_a_stream_gives_the_batches_in_order() -> None:
    reader = TrainingImages(image_set(9), PixelTransform(SIZE))
    parts = [[0, 1], [2], [], [3, 4]]
    assert [batch.ids for batch in reader.stream(parts)] == [[f"image-{i}" for i in part] for part in parts]
    assert list(reader.stream([])) == []


def test_a_bad_image_stops_the_run_or_is_left_out() -> None:
    images = image_set(4)

    def read(i: int) -> Image.Image:
        if i == 2:
            raise BadImage("image-2: is broken; mend it.")
        return Image.new("RGB", (SIZE, SIZE))

    broken = images.__class__(**{**images.__dict__, "read": read})
    with pytest.raises(BadImage, match="image-2"):
        TrainingImages(broken, PixelTransform(SIZE)).batch(range(4))
    reader = TrainingImages(broken, PixelTransform(SIZE), skip_bad=True)
    assert reader.batch(range(4)).ids == ["image-0", "image-1", "image-3"]
    assert reader.skipped == {"image-2": "image-2: is broken; mend it."}
