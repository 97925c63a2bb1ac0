"""``domain:ROOT/DOMAIN``: layouts as adaptation sets are distributed, and splits that nobody wrote down."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from vlmdefend.data import load_dataset
from vlmdefend.errors import UserError


def fill(folder: Path, classes: tuple[str, ...] = ("alarm_clock", "back-pack"), count: int = 30) -> None:
    for k, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (8, 8), (40 * k, i, 0)).save(folder / name / f"frame_{i:04d}.png")


@pytest.fixture
def office(tmp_path: Path) -> Path:
    """Office-Home's layout, and Office-31's for ``amazon``."""
    fill(tmp_path / "Art")
    fill(tmp_path / "Real World")
    fill(tmp_path / "amazon" / "images")
    return tmp_path


@pytest.mark.parametrize("domain", ["Art", "Real World", "amazon"])
def test_a_domain_is_split_once_for_all_into_four_fifths_and_one(office: Path, domain: str) -> None:
    parts = {split: load_dataset(f"domain:{office / domain}", split) for split in ("train", "test", "all")}
    train, test = set(parts["train"].ids), set(parts["test"].ids)
    assert not train & test
    assert train | test == set(parts["all"].ids)
    assert len(parts["all"]) == 60
    assert 4 <= len(test) <= 22
    assert parts["test"].class_names == ("alarm clock", "back pack")
    assert all(name.startswith(f"{domain}/") for name in train)
    found = parts["test"]
    assert all(found.read(i).getpixel((0, 0))[0] == 40 * found.labels[i] for i in range(len(found)))


def test_the_split_follows_the_paths_and_not_what_else_there_is(office: Path) -> None:
    before = set(load_dataset(f"domain:{office / 'Art'}", "test").ids)
    fill(office / "Art", ("zebra",), 5)
    after = load_dataset(f"domain:{office / 'Art'}", "test")
    assert {name for name in after.ids if "zebra" not in name} == before


def test_lists_beside_the_domain_are_its_splits(office: Path) -> None:
    (office / "Art_train.txt").write_text("Art/alarm_clock/frame_0003.png 0\nArt/back-pack/frame_0001.png 1\n")
    (office / "Art_test.txt").write_text("Art/back-pack/frame_0007.png 1\n")
    assert load_dataset(f"domain:{office / 'Art'}", "train").ids == (
        "Art/alarm_clock/frame_0003.png",
        "Art/back-pack/frame_0001.png",
    )
    assert load_dataset(f"domain:{office / 'Art'}", "test").labels == (1,)
    (office / "Art_test.txt").write_text("Art/gone/frame_0007.png 1\n")
    with pytest.raises(UserError, match=r"lists Art/gone/frame_0007.png, which is not there"):
        load_dataset(f"domain:{office / 'Art'}", "test")


def test_what_is_missing_is_said_with_what_is_there(office: Path) -> None:
    with pytest.raises(UserError, match="has Art, Real World, amazon"):
        load_dataset(f"domain:{office / 'Product'}", "train")
    with pytest.raises(UserError, match="has no split 'validation'; it has train, test and all"):
        load_dataset(f"domain:{office / 'Art'}", "validation")
    (office / "empty").mkdir()
    with pytest.raises(UserError, match="has no class folder"):
        load_dataset(f"domain:{office / 'empty'}", "train")
