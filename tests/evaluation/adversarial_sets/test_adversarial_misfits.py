"""A saved set is scored only where it fits, and only as it was written."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.evaluation.saved_sets import OPTIONS, craft, photos, rows_of, score
from vlmdefend.errors import UserError
from vlmdefend.evaluation.adversarial_sets.adversarial_set import AdversarialSet
from vlmdefend.evaluation.adversarial_sets.crafting import craft_set
from vlmdefend.evaluation.adversarial_sets.set_format import INDEX, MANIFEST, digest
from vlmdefend.evaluation.cell.evaluator import CellEvaluator
from vlmdefend.evaluation.grid.grid import Grid
from vlmdefend.evaluation.make_plan import make_plan
from vlmdefend.progress import Progress


@pytest.fixture
def copied(home: Path, tmp_path: Path) -> Path:
    """A set of its own for a test that damages it."""
    return Path(shutil.copytree(home / "tiny-vit", tmp_path / "set"))


def reseal(folder: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> None:
    """Rewrite image files and index rows, with a manifest that agrees."""
    manifest = json.loads((folder / MANIFEST).read_text())
    rows = rows_of(folder)
    for entry in manifest["images"]:
        tensors = load_file(folder / entry["name"])
        for row in rows:
            if row["file"] == entry["name"]:
                change(tensors, row)
        save_file(tensors, folder / entry["name"])
    (folder / INDEX).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for entry in [manifest["index"], *manifest["images"]]:
        content = (folder / entry["name"]).read_bytes()
        entry |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest["sha256"] = digest({k: v for k, v in manifest.items() if k != "sha256"})
    (folder / MANIFEST).write_text(json.dumps(manifest))


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-10] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
@pytest.mark.parametrize("name", ["images-00001.safetensors", INDEX, MANIFEST])
def test_a_damaged_set_is_refused_in_one_sentence_that_names_the_file(
    damage: Callable[[Path], None], name: str, copied: Path, tmp_path: Path
) -> None:
    damage(copied / name)
    with pytest.raises(UserError) as error:
        score(copied, tmp_path / "runs")
    message = str(error.value)
    assert name in message
    assert "again" in message or "give the --out folder" in message
    assert "\n" not in message


def test_an_edited_radius_is_noticed(copied: Path, tmp_path: Path) -> None:
    text = (copied / MANIFEST).read_text()
    (copied / MANIFEST).write_text(text.replace(f'"eps": {8 / 255}', '"eps": 0.5'))
    assert text != (copied / MANIFEST).read_text()
    with pytest.raises(UserError, match="cut off or edited"):
        score(copied, tmp_path / "runs")


def test_a_newer_format_asks_for_an_upgrade(copied: Path, tmp_path: Path) -> None:
    manifest = json.loads((copied / MANIFEST).read_text())
    (copied / MANIFEST).write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(UserError, match=r"format 99.*upgrade vlmdefend"):
        score(copied, tmp_path / "runs")


def test_a_manifest_leads_to_no_file_outside_the_set(copied: Path, tmp_path: Path) -> None:
    manifest = json.loads((copied / MANIFEST).read_text())
    manifest["images"][0]["name"] = "../secret"
    manifest["sha256"] = digest({k: v for k, v in manifest.items() if k != "sha256"})
    (copied / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="cut off or edited"):
        AdversarialSet.open(copied)


def test_images_of_another_size_are_refused(copied: Path, tmp_path: Path) -> None:
    def shrink(tensors: dict[str, Tensor], row: dict[str, Any]) -> None:
        tensors["images"] = tensors["images"][..., :16, :16].contiguous()

    reseal(copied, shrink)
    with pytest.raises(UserError, match="are 16x16 pixels, the model takes 32x32"):
        score(copied, tmp_path / "runs")


def test_other_clean_pixels_are_refused(copied: Path, tmp_path: Path) -> None:
    reseal(copied, lambda tensors, row: row.update(clean_hash="0" * 16))
    with pytest.raises(UserError, match="has other pixels here than when it was attacked"):
        score(copied, tmp_path / "runs")


def test_images_outside_their_budget_are_refused(copied: Path, tmp_path: Path) -> None:
    def brighten(tensors: dict[str, Tensor], row: dict[str, Any]) -> None:
        tensors["images"][row["position"]] = (tensors["images"][row["position"]] + 0.2).clamp(0, 1)

    reseal(copied, brighten)
    with pytest.raises(UserError, match="outside its own budget"):
        score(copied, tmp_path / "runs")


def test_another_data_set_is_refused(home: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"20 of its 20 images.* not in mnist .*crafted on fashion"):
        score(home / "tiny-vit", tmp_path / "runs", dataset="mnist")


def test_an_image_that_is_missing_now_is_named(tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos")
    craft(tmp_path / "set", dataset=f"folder:{folder}")
    gone = sorted(folder.rglob("*.png"))[0]
    gone.rename(tmp_path / "elsewhere.png")
    shutil.copy(tmp_path / "elsewhere.png", gone.with_name("new.png"))
    with pytest.raises(UserError, match=f"1 of its 12 images, '.*{gone.name}'"):
        score(tmp_path / "set", tmp_path / "runs")


def test_a_folder_that_moved_is_found_by_its_new_name_and_one_that_changed_is_refused(tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos")
    crafted = craft(tmp_path / "set", dataset=f"folder:{folder}")
    moved_to = folder.rename(tmp_path / "moved")
    ((record, _),) = score(tmp_path / "set", tmp_path / "runs", dataset=f"folder:{moved_to}")
    assert record.robust == crafted.record.robust
    file = sorted(moved_to.rglob("*.png"))[0]
    Image.new("RGB", (28, 28), "red").save(file)
    with pytest.raises(UserError, match="have changed since it was crafted"):
        score(tmp_path / "set", tmp_path / "runs", dataset=f"folder:{moved_to}")


def test_files_that_change_before_the_set_is_sealed_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = CellEvaluator.run

    def then_flip(evaluator: CellEvaluator, *args: Any) -> Any:
        result = run(evaluator, *args)
        flip(tmp_path / "set" / "images-00000.safetensors")
        return result

    monkeypatch.setattr(CellEvaluator, "run", then_flip)
    with pytest.raises(UserError, match="does not hold what was scored"):
        craft(tmp_path / "set")
    assert not (tmp_path / "set" / MANIFEST).exists()


def test_an_attack_on_the_prompts_has_no_images_to_save(tmp_path: Path) -> None:
    plan = make_plan(Grid.build({"eps": "8/255", "attacker": "adaptive"}, OPTIONS))
    plan = replace(plan, cells=[replace(plan.cells[0], norm="tokens", eps=2.0)])
    with pytest.raises(UserError, match="changes the prompts, not the images"):
        craft_set(plan, tmp_path / "set", Progress())
