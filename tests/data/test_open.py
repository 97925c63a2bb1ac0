from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vlmdefend.data import listed_datasets, load_dataset
from vlmdefend.errors import UnknownName, UserError

Layout = Callable[..., Path]


def test_every_listed_name_is_listed_once_with_a_summary() -> None:
    lines = listed_datasets()
    names = [line.name for line in lines]
    assert len(set(names)) == len(names)
    assert all(line.summary and line.where for line in lines)
    assert {"fashion", "emoji:sketch", "cifar10", "imagenet-r", "folder:PATH", "wds:PATH"} <= set(names)


def test_listing_names_imports_no_torch() -> None:
    code = (
        "import sys; from vlmdefend.data import listed_datasets; listed_datasets(); "
        "print([m for m in ('torch', 'torchvision', 'open_clip', 'timm', 'PIL.Image', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "meant"), [("fashoin", "'fashion'"), ("emoji:googel", "'emoji:google'"), ("CIFAR1O", "'cifar10'")]
)
def test_a_misspelt_name_gets_the_nearest_names_of_every_source(name: str, meant: str) -> None:
    with pytest.raises(UnknownName, match=meant):
        load_dataset(name)


def test_half_a_name_lists_its_family() -> None:
    with pytest.raises(UnknownName, match=r"choose one of emoji:google, emoji:twitter"):
        load_dataset("emoji")


def test_a_folder_without_a_prefix_is_refused_with_the_right_prefix(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match=f"write folder:{tmp_path}"):
        load_dataset(str(tmp_path))


def test_a_folder_that_may_not_be_read_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(UserError, match=rf"{tmp_path} cannot be read \(Permission denied\)"):
        load_dataset(f"folder:{tmp_path}")


@pytest.mark.parametrize("prefix", ["folder:", "wds:"])
def test_a_prefix_without_a_path_shows_its_form(prefix: str) -> None:
    with pytest.raises(UserError, match=f"write {prefix}PATH"):
        load_dataset(prefix)


def test_case_and_underscores_of_a_fixed_name_do_not_matter() -> None:
    assert load_dataset("UCI_Digits", limit=3).name == "uci-digits"


def test_limit_and_seed_choose_a_balanced_subset(layout: Layout, encode: Callable[..., bytes]) -> None:
    members = [m for i in range(12) for m in ((f"s{i}.png", encode(i)), (f"s{i}.cls", str(i % 2).encode()))]
    folder = layout({0: members})
    images = load_dataset(f"wds:{folder}", limit=6, seed=3)
    assert sorted(images.labels) == [0, 0, 0, 1, 1, 1]
    assert images.ids == load_dataset(f"wds:{folder}", limit=6, seed=3).ids
    with pytest.raises(UserError, match="--limit 0"):
        load_dataset(f"wds:{folder}", limit=0)


def test_class_names_and_templates_can_be_replaced() -> None:
    names = [f"number {i}" for i in range(10)]
    images = load_dataset("mnist", limit=5, classes=names, templates=["This is a photo of a {}", "{c}!"])
    assert images.class_names == tuple(names)
    assert images.templates == ("This is a photo of a {c}", "{c}!")


def test_a_class_list_of_the_wrong_length_is_refused_with_both_counts() -> None:
    with pytest.raises(UserError, match=r"has 10 classes, but 2 class names"):
        load_dataset("mnist", classes=["a", "b"])


@pytest.mark.parametrize("templates", [[], ["no place"], ["a {c} and a {d}"], "a {c}"])
def test_a_template_without_a_place_for_the_name_is_refused(templates: list[str]) -> None:
    with pytest.raises(UserError, match="template"):
        load_dataset("mnist", templates=templates)
