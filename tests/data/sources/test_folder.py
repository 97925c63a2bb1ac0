from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from vlmdefend.data import load_dataset
from vlmdefend.data.base import BadImage, ImageSet
from vlmdefend.errors import UserError

Put = Callable[..., Path]


def opened(path: Path, split: str = "test") -> ImageSet:
    return load_dataset(f"folder:{path}", split)


def test_classes_are_the_sorted_folders_and_ids_relative_paths(put: Put, tmp_path: Path) -> None:
    for name in ("zebra/1.png", "polar_bear/deep/b.JPG", "polar_bear/a.jpeg", "sea-lion/x.webp"):
        put(name)
    images = opened(tmp_path)
    assert images.class_names == ("polar bear", "sea lion", "zebra")
    assert images.ids == ("polar_bear/a.jpeg", "polar_bear/deep/b.JPG", "sea-lion/x.webp", "zebra/1.png")
    assert images.labels == (0, 0, 1, 2)
    assert [images.read(i).mode for i in range(4)] == ["RGB"] * 4
    assert images.templates == ("a photo of a {c}.",)


@pytest.mark.parametrize("folder", ["test", "val", "valid", "validation"])
def test_a_split_folder_is_used_and_val_serves_as_test(put: Put, tmp_path: Path, folder: str) -> None:
    put("train/cat/1.png")
    put(f"{folder}/cat/2.png")
    assert opened(tmp_path).ids == opened(tmp_path / folder).ids == ("cat/2.png",)
    assert opened(tmp_path, "train").ids == ("cat/1.png",)


def test_a_split_that_is_not_there_lists_those_that_are(put: Put, tmp_path: Path) -> None:
    put("train/cat/1.png")
    with pytest.raises(UserError, match=r"has no split 'test'; it has train"):
        opened(tmp_path)


def test_hidden_files_other_files_and_files_beside_the_classes_are_ignored(put: Put, tmp_path: Path) -> None:
    for name in ("cat/1.png", "cat/.2.png", ".git/3.png", "cat/.cache/4.png", "5.png"):
        put(name)
    put("cat/Thumbs.db", b"x")
    assert opened(tmp_path).ids == ("cat/1.png",)


def test_links_to_files_and_folders_are_followed_and_a_circle_ends(put: Put, tmp_path: Path) -> None:
    real = put("elsewhere/1.png")
    root = tmp_path / "root"
    (root / "cat").mkdir(parents=True)
    (root / "cat" / "link.png").symlink_to(real)
    (root / "cat" / "again").symlink_to(root / "cat")
    (root / "dog").symlink_to(real.parent)
    images = opened(root)
    assert images.ids == ("cat/link.png", "dog/1.png")
    assert images.read(0).size == images.read(1).size


def test_an_empty_class_folder_is_refused_by_its_name(put: Put, tmp_path: Path) -> None:
    put("cat/1.png")
    put("dog/notes.txt", "none yet")
    with pytest.raises(UserError, match=r"class folder \S*dog has no image .*put images in it, or remove it"):
        opened(tmp_path)


@pytest.mark.parametrize("files", [[], ["1.png"]])
def test_a_folder_without_class_folders_is_refused(put: Put, tmp_path: Path, files: list[str]) -> None:
    for name in files:
        put(name)
    with pytest.raises(UserError, match="has no class folder"):
        opened(tmp_path)


def test_a_missing_folder_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"folder:\S*nowhere: there is no such folder"):
        opened(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["a tench\na sports car\n", "n02\ta sports car\n\nn01\ta tench\r\n"])
def test_classes_txt_names_the_folders_by_order_or_by_folder(put: Put, tmp_path: Path, text: str) -> None:
    put("n01/1.png")
    put("n02/1.png")
    put("classes.txt", text)
    assert opened(tmp_path).class_names == ("a tench", "a sports car")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("one\ntwo\nthree\n", r"has 3 names, but \S+ has 2 class folders"),
        ("n01\ta tench\n", r"no name for the class folder 'n02'"),
        ("n01\ta tench\nn02\n", r"line 'n02' is not a folder, a tab and a name"),
        ("n01\ta\nn01\tb\nn02\tc\n", r"names the folder 'n01' twice"),
        (b"caf\xe9\nx\n", r"not UTF-8"),
    ],
)
def test_a_classes_txt_that_does_not_fit_is_refused(put: Put, tmp_path: Path, text: str | bytes, message: str) -> None:
    put("n01/1.png")
    put("n02/1.png")
    put("classes.txt", text)
    with pytest.raises(UserError, match=rf"classes\.txt: .*{message}"):
        opened(tmp_path)


def test_a_bad_image_is_named_when_it_is_read_and_not_before(put: Put, tmp_path: Path) -> None:
    put("cat/1.png", b"")
    images = opened(tmp_path)
    with pytest.raises(BadImage, match=r"cat/1\.png: the file is empty"):
        images.read(0)
