from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from vlmdefend.data import load_dataset
from vlmdefend.data.sources import embedded
from vlmdefend.errors import UserError

SETS = list(embedded.SETS)


@pytest.mark.parametrize("name", SETS)
def test_both_splits_open_with_every_class_and_share_no_image(name: str) -> None:
    train, test = load_dataset(name, "train"), load_dataset(name, "test")
    assert train.class_names == test.class_names
    assert len(test.class_names) == embedded.SETS[name][1]
    assert set(test.labels) == set(train.labels) == set(range(len(test.class_names)))
    assert not set(train.ids) & set(test.ids)
    assert all("{c}" in template for template in test.templates)
    first, last = test.read(0), test.read(len(test) - 1)
    assert first.mode == last.mode == "RGB"
    assert first.size == last.size


def test_fashion_is_balanced_and_of_the_documented_size() -> None:
    assert set(Counter(load_dataset("fashion", "train").labels).values()) == {1000}
    assert set(Counter(load_dataset("fashion", "test").labels).values()) == {200}


def test_a_subset_of_emoji_is_the_same_concepts_in_every_style() -> None:
    chosen = {name: set(load_dataset(name, limit=40, seed=1).ids) for name in SETS if name.startswith("emoji:")}
    newest = len(chosen["emoji:google"] - chosen.pop("emoji:fluent"))  # Fluent has not drawn the latest few
    assert newest <= 4
    assert all(ids == chosen["emoji:google"] for ids in chosen.values())


def test_opening_the_test_split_takes_less_than_half_a_second() -> None:
    load_dataset("fashion")
    start = time.process_time()
    load_dataset("fashion")
    assert time.process_time() - start < 0.5


def test_a_split_that_does_not_exist_lists_those_that_do() -> None:
    with pytest.raises(UserError, match=r"mnist: has no split 'extra' .*it has test, train"):
        load_dataset("mnist", "extra")


def test_an_installation_without_its_assets_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(embedded, "ASSETS", tmp_path)
    with pytest.raises(UserError, match=r"fashion: its folder \S+ is missing; install the package"):
        load_dataset("fashion")


def test_an_embedded_set_is_read_from_the_folder_named_with_a_hyphen(
    monkeypatch: pytest.MonkeyPatch, layout: Callable[..., Path], encode: Callable[..., bytes]
) -> None:
    folder = layout({0: [("k.webp", encode(file_format="WEBP")), ("k.cls", b"1")]}, suffix=".tar.gz")
    folder.rename(folder.parent / "emoji-google")
    monkeypatch.setattr(embedded, "ASSETS", folder.parent)
    images = load_dataset("emoji:google")
    assert (images.ids, images.labels, images.class_names) == (("k",), (1,), ("cat", "dog"))
