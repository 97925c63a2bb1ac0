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


@pytest.mark.parametrize("place", ["", "image_list"])
def test_lists_are_found_beside_the_domain_and_in_a_folder_of_their_own(office: Path, place: str) -> None:
    (office / "image_list").mkdir()
    (office / place / "Art_train.txt").write_text("Art/alarm_clock/frame_0003.png 0\n")
    (office / place / "Art_test.txt").write_text("Art/back-pack/frame_0007.png 1\n")
    assert load_dataset(f"domain:{office / 'Art'}", "test").ids == ("Art/back-pack/frame_0007.png",)
    with pytest.raises(UserError, match="has Art, Real World, amazon;"):
        load_dataset(f"domain:{office / 'Product'}", "train")


def test_a_list_of_one_split_alone_is_none_for_the_other_would_hold_its_images(office: Path) -> None:
    before = {split: load_dataset(f"domain:{office / 'Art'}", split).ids for split in ("train", "test")}
    (office / "Art_train.txt").write_text("".join(f"{name} 0\n" for part in before.values() for name in part))
    assert {split: load_dataset(f"domain:{office / 'Art'}", split).ids for split in before} == before


@pytest.fixture
def visda(tmp_path: Path) -> Path:
    """VisDA-2017's layout: ``train`` is a domain and a class, ``test`` has folders that are no classes, and a list."""
    classes = ("aeroplane", "bicycle", "train")
    for domain in ("train", "validation"):
        fill(tmp_path / domain, classes, 20)
        lines = [f"{name}/frame_{i:04d}.png {k}\n" for k, name in enumerate(classes) for i in range(20)]
        (tmp_path / domain / "image_list.txt").write_text("".join(lines))
    fill(tmp_path / "test", ("trunk00", "trunk01"), 20)
    lines = [f"trunk{k:02d}/frame_{i:04d}.png {(i + k) % 3}\n" for k in range(2) for i in range(20)]
    (tmp_path / "test" / "image_list.txt").write_text("".join(lines))
    return tmp_path


@pytest.mark.parametrize("domain", ["train", "validation", "test"])
def test_visdas_domains_have_the_same_classes_however_they_are_written_down(visda: Path, domain: str) -> None:
    found = load_dataset(f"domain:{visda / domain}", "all")
    assert found.class_names == ("aeroplane", "bicycle", "train")
    for i, name in enumerate(found.ids):
        folder, k = name.split("/")[1], int(name[-6:-4])
        expected = (k + int(folder[-1])) % 3 if domain == "test" else found.class_names.index(folder)
        assert found.labels[i] == expected
        assert found.read(i).getpixel((0, 0))[1] == k
    assert len(found) == (40 if domain == "test" else 60)
    parts = [set(load_dataset(f"domain:{visda / domain}", split).ids) for split in ("train", "test")]
    assert parts[0] | parts[1] == set(found.ids)
    assert not parts[0] & parts[1]


def test_numbers_without_a_domain_that_names_them_are_refused(visda: Path) -> None:
    from shutil import rmtree

    for domain in ("train", "validation"):
        rmtree(visda / domain)
    with pytest.raises(UserError, match=r"as numbers up to 2.*put the set's train or validation folder"):
        load_dataset(f"domain:{visda / 'test'}", "test")
    (visda / "test" / "image_list.txt").write_text("trunk00/frame_0000.png zero\n")
    with pytest.raises(UserError, match="no list of a path and a number"):
        load_dataset(f"domain:{visda / 'test'}", "test")


def test_pacs_keeps_its_own_lists_out_of_the_splits(tmp_path: Path) -> None:
    fill(tmp_path / "kfold" / "art_painting", ("dog", "horse"))
    (tmp_path / "kfold" / "art_painting_test_kfold.txt").write_text("art_painting/dog/frame_0000.png 1\n")
    found = load_dataset(f"domain:{tmp_path / 'kfold' / 'art_painting'}", "test")
    assert len(found) > 1
    assert found.class_names == ("dog", "horse")


def test_what_is_missing_is_said_with_what_is_there(office: Path) -> None:
    with pytest.raises(UserError, match="has Art, Real World, amazon"):
        load_dataset(f"domain:{office / 'Product'}", "train")
    with pytest.raises(UserError, match="has no split 'validation'; it has train, test and all"):
        load_dataset(f"domain:{office / 'Art'}", "validation")
    (office / "empty").mkdir()
    with pytest.raises(UserError, match="has no class folder"):
        load_dataset(f"domain:{office / 'empty'}", "train")
