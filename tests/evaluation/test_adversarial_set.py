"""A saved set holds the bits that were scored, says what they are, and is scored elsewhere only where it fits."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import vlmdefend
from vlmdefend.data.loader import load_batch
from vlmdefend.data.transforms import PixelTransform
from vlmdefend.errors import UserError
from vlmdefend.evaluation.adversarial_set import AdversarialSet
from vlmdefend.evaluation.crafting import Crafted, craft_set
from vlmdefend.evaluation.grid import Grid
from vlmdefend.evaluation.listener import Listener
from vlmdefend.evaluation.plan import make_plan
from vlmdefend.evaluation.png import to_levels, to_pixels
from vlmdefend.evaluation.set_format import INDEX, MANIFEST, digest
from vlmdefend.evaluation.verdict import Judge
from vlmdefend.rng import ImageRng
from vlmdefend.types import Threat

COUNT = 20
EVIL = ("../../escaped", "<script>alert(1)</script>", "two\nlines", 'a,b\t"c"', "/absolute", "\u30b7\u30e3\u30c4")
OPTIONS: dict[str, Any] = {"limit": COUNT, "batch_size": 8, "device": "cpu"}


def craft(out: Path, *, png: bool = False, ids: tuple[str, ...] = (), **options: Any) -> Crafted:
    """Craft in this process; ``ids`` are the names of the first images."""
    plan = make_plan(Grid.build({"eps": "8/255", "attacker": "adaptive"}, {**OPTIONS, **options}))
    if ids:
        (planned,) = plan.cells
        images = replace(planned.images, ids=(*ids, *planned.images.ids[len(ids) :]))
        plan = replace(plan, cells=[replace(planned, images=images)])
    return craft_set(plan, out, Listener(), png=png)


def score(folder: Path, out: Path, **options: Any) -> Any:
    found = vlmdefend.evaluate(out, adversarial=str(folder), batch_size=8, device="cpu", **options)
    if found.failures:
        raise UserError(found.failures[0].message)
    return found.results


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sets of both embedded models, never changed."""
    folder = tmp_path_factory.mktemp("sets")
    for model in ("tiny-vit", "tiny-rn"):
        craft(folder / model, png=True, model=model)
    return folder


@pytest.fixture
def copied(home: Path, tmp_path: Path) -> Path:
    """A set of its own for a test that damages it."""
    return Path(shutil.copytree(home / "tiny-vit", tmp_path / "set"))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / INDEX).read_text().splitlines()]


def clean_of(crafted: Crafted) -> Tensor:
    return load_batch(crafted.images, range(len(crafted.images)), crafted.transform, skip_bad=False)[0].images


# what is saved


def test_the_files_hold_the_bits_that_were_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scored: list[Tensor] = []
    answer = Judge.answer
    monkeypatch.setattr(Judge, "answer", lambda judge, x, ids: scored.append(x.clone()) or answer(judge, x, ids))
    crafted = craft(tmp_path / "set")
    rows = rows_of(tmp_path / "set")
    saved = torch.stack([load_file(tmp_path / "set" / row["file"])["images"][row["position"]] for row in rows])
    assert saved.dtype == torch.float32
    for batch in saved.split(8):
        assert any(torch.equal(batch, asked) for asked in scored)
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


# 8 bits


def on_levels(count: int) -> Tensor:
    levels = torch.randint(0, 256, (count, 3, 9, 9), generator=torch.Generator().manual_seed(3))
    return levels.float() / 255


def moved(clean: Tensor, threat: Threat) -> Tensor:
    """A point on the edge of the ball."""
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(4))
    far = noise.sign() if threat.norm == "linf" else noise
    return threat.project(clean + 10 * far, clean)


@pytest.mark.parametrize("levels", [0.5, 1, 1.5, 4, 8])
def test_png_levels_are_within_eps_in_whole_levels(levels: float) -> None:
    clean = on_levels(6)
    threat = Threat("linf", levels / 255)
    found = to_levels(moved(clean, threat), clean, threat).long()
    assert ((found - (clean * 255).round().long()).abs() <= int(levels)).all()
    assert found.min() >= 0
    assert found.max() <= 255
    if levels == int(levels):  # the edge of the ball is on the grid, so nothing may be lost
        assert torch.equal(to_pixels(found.to(torch.uint8)), moved(clean, threat).mul(255).round().div(255))


def test_png_levels_are_rounded_to_the_nearest_and_not_truncated() -> None:
    clean = torch.full((1, 3, 2, 2), 100 / 255)
    for wanted, level in ((101.4, 101), (101.6, 102), (98.6, 99), (98.4, 98)):
        assert (to_levels(torch.full_like(clean, wanted / 255), clean, Threat("linf", 2 / 255)) == level).all()


@pytest.mark.parametrize("eps", [0.05, 0.2, 1.0])
def test_png_levels_keep_an_l2_ball_and_use_most_of_it(eps: float) -> None:
    clean = on_levels(6)
    threat = Threat("l2", eps)
    found = to_pixels(to_levels(moved(clean, threat), clean, threat))
    distance = (found.double() - clean.double()).flatten(1).norm(dim=1)
    assert (distance <= eps + 1e-6).all()
    assert (distance >= 0.8 * eps).all()


def test_around_pixels_between_two_levels_the_nearest_level_is_taken_and_reported_as_outside() -> None:
    clean = torch.full((1, 3, 2, 2), 100.5 / 255)
    threat = Threat("linf", 0.25 / 255)
    found = to_levels(torch.full_like(clean, 100.7 / 255), clean, threat)
    assert (found == 101).all()
    assert not threat.contains(to_pixels(found), clean).any()


def test_what_an_attack_left_alone_stays_alone_in_8_bits() -> None:
    clean = on_levels(2)
    patched = clean.clone()
    patched[:, :, 2:4, 2:4] = 0.123
    threat = Threat("patch", 0.1)
    found = to_pixels(to_levels(patched, clean, threat))
    assert threat.contains(found, clean).all()
    assert torch.equal(found[:, :, 5:], clean[:, :, 5:])


@pytest.mark.parametrize("options", [{"eps": "1/255"}, {"eps": "4/255"}, {"eps": "0.5", "norm": "l2"}])
def test_png_files_are_judged_as_they_lie_on_the_disk(options: dict[str, str], tmp_path: Path) -> None:
    crafted = craft(tmp_path / "set", png=True, **options)
    png = [json.loads(line) for line in (tmp_path / "set" / "png" / INDEX).read_text().splitlines()]
    read = [PixelTransform(None)(Image.open(tmp_path / "set" / "png" / row["file"]).convert("RGB")) for row in png]
    images, clean = torch.stack(read), clean_of(crafted)
    model = vlmdefend.load_model("tiny-vit").zero_shot(crafted.images.class_names, ["a photo of a {c}."])
    predictions = model(images, ImageRng(0, crafted.images.ids)).logits.argmax(dim=1).tolist()
    assert [row["adversarial_prediction"] for row in png] == predictions
    assert crafted.saved.threat.contains(images, clean).all()
    assert all(row["inside"] for row in png)
    assert crafted.pngs is not None
    assert crafted.pngs.outside == 0
    assert crafted.pngs.fooled == sum(row["fooled"] for row in png)
    assert crafted.pngs.largest_distance == max(row["distance"] for row in png) <= crafted.saved.threat.eps + 1e-6
    if "norm" not in options:
        levels = (images * 255).round() - (clean * 255).round()
        assert levels.abs().max() <= round(crafted.saved.manifest.cell.eps * 255)


# scoring


def test_a_model_scores_on_its_own_set_what_evaluate_found_and_the_others_what_they_predict(
    home: Path, tmp_path: Path
) -> None:
    models = ["tiny-vit", "tiny-rn"]
    evaluated = vlmdefend.evaluate(tmp_path / "white", model=models, eps="8/255", **OPTIONS)
    whitebox = {record.cell.model: rows for record, rows in evaluated.results}
    found = {}
    for record, rows in score(f"{home}/tiny-vit,{home}/tiny-rn", tmp_path / "runs", model=models):
        assert (record.cell.attack, record.cell.attacker, record.cell.eps) == ("saved", "transfer", 8 / 255)
        found[record.cell.attack_config["source_model"], record.cell.model] = rows
    assert len(found) == 4
    for (source, target), rows in found.items():
        saved = AdversarialSet.open(home / source)
        if source == target:
            fields = (
                "id",
                "clean_prediction",
                "adversarial_prediction",
                "clean_margin",
                "adversarial_margin",
                "distance",
            )
            assert [[getattr(row, f) for f in fields] for row in rows] == [
                [getattr(row, f) for f in fields] for row in whitebox[source]
            ]
            continue
        model = vlmdefend.load_model(target).zero_shot(saved.manifest.class_names, ["a photo of a {c}."])
        rng = ImageRng(0, [row.id for row in saved.rows])
        predictions = model(saved.images(saved.rows), rng).logits.argmax(dim=1).tolist()
        right = [row.clean_correct for row in rows]
        assert [row.robust for row in rows] == [
            ok and prediction == row.label for ok, prediction, row in zip(right, predictions, rows, strict=True)
        ]


def test_a_set_against_a_defense_is_scored_on_what_was_deployed(tmp_path: Path) -> None:
    crafted = craft(tmp_path / "set", defense="jpeg", attacker="adaptive")
    assert crafted.record.cell.attacker == "adaptive"
    assert crafted.saved.manifest.source == "tiny-vit+jpeg:pgd:steps=10:adaptive"
    ((record, _),) = score(tmp_path / "set", tmp_path / "runs", defense="jpeg")
    assert (record.robust, record.clean_correct) == (crafted.record.robust, crafted.record.clean_correct)


def test_scoring_takes_no_gradient_and_other_batches_change_nothing(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ((record, rows),) = score(home / "tiny-vit", tmp_path / "a", model="tiny-rn")
    assert record.cost.attack_backwards == 0
    monkeypatch.setattr("vlmdefend.attacks.view.View.gradient", lambda *args: pytest.fail("a gradient was asked for"))
    again = vlmdefend.evaluate(tmp_path / "b", adversarial=str(home / "tiny-vit"), model="tiny-rn", batch_size=3)
    assert [row.robust for row in again.results[0][1]] == [row.robust for row in rows]


def test_the_same_scoring_again_is_found_done(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    score(home / "tiny-vit", tmp_path / "runs", model="tiny-rn")
    monkeypatch.setattr(Judge, "run", lambda *args: pytest.fail("computed again"))
    assert len(score(home / "tiny-vit", tmp_path / "runs", model="tiny-rn")) == 1


def test_a_strong_saved_attack_on_a_pipeline_is_not_taken_for_a_transfer_that_beats_the_gradient(
    tmp_path: Path,
) -> None:
    from vlmdefend.reporting import verdict_lines

    options = {**OPTIONS, "limit": 60, "batch_size": 60}
    plan = make_plan(Grid.build({"eps": "8/255", "attack": "pgd:steps=20", "attacker": "adaptive"}, options))
    craft_set(plan, tmp_path / "set", Listener())
    weak = vlmdefend.evaluate(tmp_path / "runs", attack="fgsm", eps="8/255", **options).results
    strong = score(tmp_path / "set", tmp_path / "runs")
    assert strong[0][0].robust < weak[0][0].robust - 6
    (line,) = verdict_lines([*weak, *strong])
    assert not [reason for reason in line.reasons if reason.kind.startswith("transfer")]
    assert line.worst is not None
    assert line.worst.counts[0] <= strong[0][0].robust


# what does not fit


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


def photos(folder: Path) -> Path:
    images = vlmdefend.load_dataset("fashion", limit=12)
    for i, label in enumerate(images.labels):
        place = folder / images.class_names[label].replace(" ", "_") / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        images.read(i).save(place)
    return folder


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
    run = Judge.run

    def then_flip(judge: Judge, *args: Any) -> Any:
        result = run(judge, *args)
        flip(tmp_path / "set" / "images-00000.safetensors")
        return result

    monkeypatch.setattr(Judge, "run", then_flip)
    with pytest.raises(UserError, match="does not hold what was scored"):
        craft(tmp_path / "set")
    assert not (tmp_path / "set" / MANIFEST).exists()


def test_an_attack_on_the_prompts_has_no_images_to_save(tmp_path: Path) -> None:
    plan = make_plan(Grid.build({"eps": "8/255", "attacker": "adaptive"}, OPTIONS))
    plan = replace(plan, cells=[replace(plan.cells[0], norm="tokens", eps=2.0)])
    with pytest.raises(UserError, match="changes the prompts, not the images"):
        craft_set(plan, tmp_path / "set", Listener())
