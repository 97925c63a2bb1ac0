from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlmdefend.data.base import ImageSet
from vlmdefend.errors import UserError

Toy = Callable[..., ImageSet]
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(
    labels=st.lists(st.integers(0, 6), min_size=1, max_size=80),
    limit=st.integers(1, 90),
    seed=st.integers(0, 5),
)
def test_class_counts_of_a_subset_differ_by_at_most_one_while_a_class_has_images(
    toy_set: Toy, labels: list[int], limit: int, seed: int
) -> None:
    images = toy_set(labels)
    chosen = images.subset(limit, seed)
    assert len(chosen) == min(limit, len(images))
    counts, available = Counter(chosen.labels), Counter(images.labels)
    most = max(counts.values())
    assert all(counts[c] >= most - 1 or counts[c] == available[c] for c in available)


@quick
@given(labels=st.lists(st.integers(0, 3), min_size=2, max_size=40), seed=st.integers(0, 3), data=st.data())
def test_a_subset_depends_on_ids_and_seed_alone_and_not_on_the_order_of_the_set(
    toy_set: Toy, labels: list[int], seed: int, data: st.DataObject
) -> None:
    images = toy_set(labels)
    limit = data.draw(st.integers(1, len(labels)))
    order = data.draw(st.permutations(range(len(labels))))
    assert set(images.subset(limit, seed).ids) == set(images.select(order).subset(limit, seed).ids)
    elsewhere = replace(images, name="the same set in another folder")
    assert images.subset(limit, seed).ids_hash == elsewhere.subset(limit, seed).ids_hash


def test_a_larger_limit_contains_the_smaller_one_and_order_is_kept(toy_set: Toy) -> None:
    images = toy_set([i % 5 for i in range(100)])
    small, large = images.subset(23, 1), images.subset(60, 1)
    assert set(small.ids) < set(large.ids)
    assert list(large.ids) == sorted(large.ids)


def test_another_seed_chooses_other_images(toy_set: Toy) -> None:
    images = toy_set([i % 5 for i in range(100)])
    assert images.subset(20, 0).ids != images.subset(20, 1).ids


def test_a_subset_reads_the_pictures_of_its_own_ids(toy_set: Toy) -> None:
    chosen = toy_set([i % 5 for i in range(100)]).subset(7, 0)
    assert [chosen.read(i).getpixel((0, 0))[0] for i in range(7)] == [int(name[2:]) for name in chosen.ids]


@pytest.mark.parametrize("limit", [0, -3])
def test_a_limit_below_one_is_refused(toy_set: Toy, limit: int) -> None:
    with pytest.raises(UserError, match=f"--limit {limit}"):
        toy_set([0, 1]).subset(limit)


@pytest.mark.parametrize("limit", [None, 2, 99])
def test_no_limit_or_a_large_one_keeps_everything(toy_set: Toy, limit: int | None) -> None:
    images = toy_set([0, 1])
    assert images.subset(limit) is images


def test_the_hash_of_ids_changes_with_a_label_an_id_and_the_order(toy_set: Toy) -> None:
    images = toy_set([0, 1, 2])
    others = [
        replace(images, labels=(0, 1, 1)),
        replace(images, ids=("id0000", "id0001", "id9999")),
        images.select([1, 0, 2]),
    ]
    assert len({images.ids_hash, *(other.ids_hash for other in others)}) == 4


def test_a_label_without_a_name_names_the_label_and_the_count(toy_set: Toy) -> None:
    with pytest.raises(UserError, match=r"label 2 has no name.* 2\s+names"):
        replace(toy_set([0, 1, 2]), class_names=("a", "b"))


def test_two_images_with_one_id_are_refused(toy_set: Toy) -> None:
    with pytest.raises(UserError, match="share an id"):
        replace(toy_set([0, 1]), ids=("a", "a"))
