"""What makes a cell another cell, and what one model's trouble does to the others."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlmdefend.defenses import DEFENSES
from vlmdefend.errors import UserError
from vlmdefend.evaluation.grid.grid import Grid
from vlmdefend.evaluation.launchers.inline import evaluate, run_plan
from vlmdefend.evaluation.make_plan import make_plan
from vlmdefend.evaluation.store import fingerprint
from vlmdefend.evaluation.store.fingerprint import code_hash
from vlmdefend.evaluation.store.run_folder import Store
from vlmdefend.models.names import ASSETS
from vlmdefend.progress import Progress

QUICK: dict[str, Any] = {"attack": "none", "limit": 8, "device": "cpu", "batch_size": 8}


def keys(out: Path, **options: Any) -> set[str]:
    found = evaluate(out=out, **{**QUICK, **options})
    assert not found.failures, found.failures
    return {record.key for record, _ in found.results}


def model_folder(folder: Path, **preprocess: Any) -> Path:
    """The embedded model as a folder of the user's, with another preprocessing."""
    folder.mkdir(exist_ok=True)
    config = json.loads((ASSETS / "tiny-vit" / "open_clip_config.json").read_text())
    config["preprocess_cfg"] = {**config.get("preprocess_cfg", {}), **preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    weights = (ASSETS / "tiny-vit" / "open_clip_model.safetensors.xz").read_bytes()
    (folder / "open_clip_model.safetensors").write_bytes(lzma.decompress(weights))
    return folder


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"templates": ["a {c}"]},
        {"batch_size": 4},
        {"limit": 9},
        {"model": "tiny-rn"},
        {"defense": "jpeg"},
        {"defense": "jpeg:quality=50"},
        {"dataset": "emoji:sketch"},
        {"split": "train"},
        {"skip_bad": True},
    ],
    ids=str,
)
def test_another_choice_is_another_cell(change: dict[str, Any], tmp_path: Path) -> None:
    base = keys(tmp_path)
    assert base == keys(tmp_path)
    assert not base & keys(tmp_path, **change)


def test_another_radius_norm_or_option_of_the_attack_is_another_cell(tmp_path: Path) -> None:
    attacks: list[dict[str, Any]] = [
        {},
        {"eps": "5/255"},
        {"norm": "l2"},
        {"attack": "fgsm:loss=dlr"},
        {"attack": "pgd:steps=1"},
    ]
    found = [keys(tmp_path, **{"attack": "fgsm", "eps": "4/255", **options}) for options in attacks]
    assert len(set.union(*found)) == len(attacks)


def test_other_class_names_are_another_cell(tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("\n".join("abcdefghij"))
    assert not keys(tmp_path / "runs") & keys(tmp_path / "runs", classes=names)


def test_other_weights_or_another_preprocessing_in_the_same_folder_are_another_cell(tmp_path: Path) -> None:
    name = f"local-dir:{model_folder(tmp_path / 'model')}"
    first = keys(tmp_path / "runs", model=name)
    assert first == keys(tmp_path / "runs", model=name)
    model_folder(tmp_path / "model", mean=[0.1, 0.1, 0.1])
    second = keys(tmp_path / "runs", model=name)
    assert not first & second, "the weights are the same, what they are shown is not"


def test_other_pictures_under_the_same_names_are_another_cell(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "set" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32), (10, 200, 30)).save(tmp_path / "set" / name / "0.png")
    dataset = f"folder:{tmp_path / 'set'}"
    first = keys(tmp_path / "runs", dataset=dataset)
    assert first == keys(tmp_path / "runs", dataset=dataset)
    Image.new("RGB", (32, 32), (10, 200, 31)).save(tmp_path / "set" / "dog" / "0.png")
    assert not first & keys(tmp_path / "runs", dataset=dataset)


def test_how_it_is_run_is_not_part_of_the_cell(tmp_path: Path) -> None:
    assert keys(tmp_path) == keys(tmp_path, threads=1)


def test_a_model_that_cannot_be_loaded_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlmdefend.evaluation.launchers import inline

    load = inline.load_model

    def broken(name: str, **options: Any) -> Any:
        if name == "tiny-rn":
            raise RuntimeError("a defect\nof the loader")
        return load(name, **options)

    monkeypatch.setattr(inline, "load_model", broken)
    found = evaluate(out=tmp_path, **{**QUICK, "model": ["tiny-rn", "tiny-vit"]})
    assert [record.cell.model for record, _ in found.results] == ["tiny-vit"]
    (failure,) = found.failures
    assert failure == ("model tiny-rn", "RuntimeError: a defect of the loader", False)


def test_every_cell_is_announced_and_all_its_images_are_counted(tmp_path: Path) -> None:
    class Counts(Progress):
        begun = images = ended = 0

        def begin(self, unit: Any, total: int, done: int = 0) -> None:
            self.begun += 1

        def advance(self, unit: Any, count: int = 1) -> None:
            self.images += count

        def end(self, result: Any, *, reused: bool = False) -> None:
            self.ended += 1

    plan = make_plan(Grid.build({}, {**QUICK, "defense": ["none", "jpeg"]}))
    for _ in range(2):  # computed, then found done
        heard = Counts()
        run_plan(plan, Store(tmp_path), heard)
        assert (heard.begun, heard.ended, heard.images) == (2, 2, 16)


def test_a_file_that_a_defense_names_is_part_of_the_key(tmp_path: Path) -> None:
    """Other statistics under the same path are another defense; a word is no path, though a folder is called so."""
    file = tmp_path / "known.safetensors"
    file.write_bytes(b"one")
    defense = DEFENSES.create("tapt", statistics=str(file))
    first = code_hash(defense)
    assert code_hash(defense) == first
    file.write_bytes(b"two")
    assert set(code_hash(defense)) == set(first) == {"statistics_hash"}
    assert code_hash(defense) != first
    assert code_hash(DEFENSES.create("interpolate", of=f"[tapt:statistics={file}]")) != {}
    assert code_hash(DEFENSES.create("tapt", statistics="fashion")) == {}


def test_a_folder_that_holds_everything_is_refused_before_a_file_of_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "prior"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.txt").write_text("")
    defense = {"defense": [f"clipure_diff:prior={folder}"]}
    monkeypatch.setattr(fingerprint, "FILES", 3)
    assert len(make_plan(Grid.build({}, {**QUICK, **defense})).cells) == 1
    monkeypatch.setattr(fingerprint, "FILES", 2)
    monkeypatch.setattr(Path, "read_bytes", lambda file: pytest.fail("a file was read"))
    with pytest.raises(UserError, match=r"clipure_diff:prior=.* a folder of more than 2 files; name the"):
        make_plan(Grid.build({}, {**QUICK, **defense}))


def test_a_file_that_may_not_be_read_is_named_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "known.safetensors"
    file.write_bytes(b"one")
    monkeypatch.setattr(fingerprint, "access", lambda place, mode: place != file)  # root may read everything
    expected = f"tapt:statistics='{file}': {file} cannot be read (Permission denied); name a file or a folder that you"
    for text in (f"tapt:statistics={file}", f"interpolate:of=[tapt:statistics={file}]"):
        with pytest.raises(UserError) as refused:
            make_plan(Grid.build({}, {**QUICK, "defense": [text]}))
        assert str(refused.value) == f"{expected} may read."


@pytest.mark.parametrize("written", ["~nobody-of-this-name/known.safetensors", "a/" + "b" * 300, "eps/4"])
def test_what_no_file_can_be_called_names_no_file(written: str) -> None:
    assert code_hash(DEFENSES.create("tapt", statistics=written)) == {}
