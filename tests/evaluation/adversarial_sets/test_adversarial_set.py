"""A saved set holds the bits that were scored, and says what they are."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import vlmdefend
from tests.evaluation.saved_sets import COUNT, clean_of, craft, photos, rows_of, score
from vlmdefend.evaluation.adversarial_sets.adversarial_set import AdversarialSet
from vlmdefend.evaluation.adversarial_sets.set_format import INDEX, MANIFEST
from vlmdefend.evaluation.cell.defended_model import DefendedModel
from vlmdefend.rng import ImageRng

EVIL = ("../../escaped", "<script>alert(1)</script>", "two\nlines", 'a,b\t"c"', "/absolute", "\u30b7\u30e3\u30c4")


def test_the_files_hold_the_bits_that_were_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scored: list[Tensor] = []
    predict = DefendedModel.predict
    monkeypatch.setattr(
        DefendedModel, "predict", lambda model, x, ids: scored.append(x.clone()) or predict(model, x, ids)
    )
    crafted = craft(tmp_path / "set")
    rows = rows_of(tmp_path / "set")
    saved = torch.stack([load_file(tmp_path / "set" / row["file"])["images"][row["position"]] for row in rows])
    assert saved.dtype == torch.float32
    for batch in saved.split(8):
        assert any(torch.equal(batch, images) for images in scored)
    assert torch.equal(crafted.saved.images(crafted.saved.rows), saved)
    assert not torch.equal(saved, clean_of(crafted))


def test_the_index_says_what_a_fresh_measurement_says(tmp_path: Path) -> None:
    crafted = craft(tmp_path / "set")
    images, clean = crafted.saved.images(crafted.saved.rows), clean_of(crafted)
    model = vlmdefend.load_model("tiny-vit").zero_shot(crafted.images.class_names, ["a photo of a {c}."])
    rng = ImageRng(0, crafted.images.ids)
    rows = rows_of(tmp_path / "set")
    assert [row["number"] for row in rows] == list(range(COUNT))
    assert [row["id"] for row in rows] == list(crafted.images.ids)
    assert [row["label"] for row in rows] == list(crafted.images.labels)
    assert [row["adversarial_prediction"] for row in rows] == model(images, rng).logits.argmax(dim=1).tolist()
    assert [row["clean_prediction"] for row in rows] == model(clean, rng).logits.argmax(dim=1).tolist()
    assert [row["distance"] for row in rows] == (images.double() - clean.double()).abs().amax((1, 2, 3)).tolist()
    fooled = [r["clean_prediction"] == r["label"] != r["adversarial_prediction"] for r in rows]
    assert [row["fooled"] for row in rows] == fooled
    assert 0 < sum(fooled) == crafted.saved.manifest.fooled


def test_parquet_holds_what_the_json_lines_hold(home: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    assert parquet.read_table(home / "tiny-vit" / "index.parquet").to_pylist() == rows_of(home / "tiny-vit")


def test_without_pyarrow_the_json_lines_are_there_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    craft(tmp_path / "set")
    assert len(rows_of(tmp_path / "set")) == COUNT
    assert not (tmp_path / "set" / "index.parquet").exists()


def test_the_manifest_names_model_threat_protocol_code_and_versions(home: Path) -> None:
    manifest = json.loads((home / "tiny-rn" / MANIFEST).read_text())
    cell = manifest["cell"]
    assert (cell["model"], cell["attack"], cell["norm"], cell["eps"]) == ("tiny-rn", "pgd", "linf", 8 / 255)
    assert cell["weights_hash"]
    assert cell["code_hash"]
    assert manifest["protocol"]["name"] == "unified"
    assert {"vlmdefend", "torch", "open_clip", "python"} <= set(manifest["environment"])
    for file in [manifest["index"], *manifest["images"]]:
        assert hashlib.sha256((home / "tiny-rn" / file["name"]).read_bytes()).hexdigest() == file["sha256"]


def test_two_crafts_are_the_same_files_to_the_byte(home: Path, tmp_path: Path) -> None:
    craft(tmp_path / "again", png=True)
    for file in sorted((home / "tiny-vit").rglob("*")):
        if file.is_file() and "cells" not in file.parts:  # a record holds the time
            assert (tmp_path / "again" / file.relative_to(home / "tiny-vit")).read_bytes() == file.read_bytes(), file


def test_ids_name_no_file_and_come_back_as_they_were(tmp_path: Path) -> None:
    crafted = craft(tmp_path / "deep" / "set", png=True, ids=EVIL)
    assert [row["id"] for row in rows_of(tmp_path / "deep" / "set")][: len(EVIL)] == list(EVIL)
    assert [row.id for row in AdversarialSet.open(tmp_path / "deep" / "set").rows] == list(crafted.images.ids)
    assert [p.name for p in tmp_path.iterdir()] == ["deep"]
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["set"]
    names = {p.name for p in (tmp_path / "deep" / "set" / "png").iterdir()}
    assert names == {INDEX, *(f"{i:05d}.png" for i in range(COUNT))}


def test_images_that_cannot_be_read_are_left_out_of_the_set(tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos")
    broken = sorted(folder.rglob("*.png"))[5]
    broken.write_bytes(b"no image")
    crafted = craft(tmp_path / "set", dataset=f"folder:{folder}", skip_bad=True)
    assert len(crafted.saved.rows) == 11
    assert not any(row.id.endswith(f"{broken.parent.name}/{broken.name}") for row in crafted.saved.rows)
    ((record, rows),) = score(tmp_path / "set", tmp_path / "runs", model="tiny-vit")
    assert (record.n, record.robust) == (11, crafted.record.robust)
    assert len(rows) == 11
