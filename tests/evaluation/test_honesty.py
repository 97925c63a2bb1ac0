"""What could make numbers look better than they are: a misleading surrogate, changed files, a missing model."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from PIL import Image

import vlmdefend
from vlmdefend.attacks.pgd import Pgd
from vlmdefend.data.loader import load_batch
from vlmdefend.data.transforms import PixelTransform
from vlmdefend.defenses.base import Defense, Paradigm, Recipe, TransformedInput
from vlmdefend.evaluation import run as run_module
from vlmdefend.evaluation.attackers import Variant, craft
from vlmdefend.evaluation.counting import Counted
from vlmdefend.evaluation.verdict import Judge
from vlmdefend.reporting import load_runs
from vlmdefend.rng import ImageRng
from vlmdefend.types import Pipeline, Threat


@dataclass(frozen=True, kw_only=True)
class Rolled(Defense):
    """Deploys the bare model, and tells the attacker that it shifts the image."""

    name: ClassVar[str] = "rolled"
    paradigm: ClassVar[Paradigm] = "training-free"
    summary: ClassVar[str] = "a surrogate that predicts something else"
    citation: ClassVar[str] = "–"
    recipe: ClassVar[Recipe] = Recipe("misleading")

    def wrap(self, model: Pipeline) -> Pipeline:
        return model

    def surrogate(self, model: Pipeline) -> Pipeline:
        return TransformedInput(model, lambda images, rng: images.roll(3, dims=-1))


def test_a_surrogate_with_other_values_does_not_spare_the_images_it_misclassifies() -> None:
    model = vlmdefend.load_model("tiny-rn", device="cpu")
    images = vlmdefend.load_dataset("fashion", limit=40)
    batch = load_batch(images, range(40), PixelTransform(model.image_size), skip_bad=False)[0]
    classifier = model.zero_shot(images.class_names, ["a photo of a {c}."])
    rng, threat = ImageRng(0, batch.ids, "attacker"), Threat("linf", 8 / 255)
    attacks = {Variant(): Pgd(steps=3)}
    arguments = ("adaptive", attacks, Rolled(), classifier, batch.images, batch.labels, threat, rng, 16)
    assert (craft(*arguments).steps == 0).any()  # believed, it lets images go that the deployed model gets right
    assert (craft(*arguments, stop=False).steps == 3).all()

    judge = object.__new__(Judge)
    judge.cell = type("Cell", (), {"attacker": "adaptive", "seed": 0})()  # type: ignore[assignment]
    judge.defense, judge.width = Rolled(), 16
    judge.counted = Counted(classifier)
    judge.deployed = judge.defense.wrap(judge.counted)
    assert not judge._surrogate_agrees(batch)


def folder_of(shade: int, path: Path) -> None:
    for label in ("bag", "coat"):
        (path / label).mkdir(parents=True, exist_ok=True)
        for i in range(3):
            Image.new("RGB", (32, 32), (shade, 40 * i, 128)).save(path / label / f"{i}.png")


def test_files_that_changed_under_the_same_names_are_other_images(tmp_path: Path) -> None:
    options = {"dataset": f"folder:{tmp_path / 'photos'}", "eps": "4/255", "steps": 2, "threads": 1}
    folder_of(20, tmp_path / "photos")
    first = vlmdefend.evaluate(tmp_path / "runs", **options)
    assert vlmdefend.evaluate(tmp_path / "runs", **options).reused == 1
    folder_of(200, tmp_path / "photos")
    second = vlmdefend.evaluate(tmp_path / "runs", **options)
    assert second.reused == 0
    assert second.results[0][1] != first.results[0][1]


def test_a_run_without_skip_bad_does_not_reuse_one_that_skipped(tmp_path: Path) -> None:
    folder_of(20, tmp_path / "photos")
    (tmp_path / "photos" / "bag" / "0.png").write_bytes(b"no picture")
    options = {"dataset": f"folder:{tmp_path / 'photos'}", "eps": "4/255", "steps": 2, "threads": 1}
    assert vlmdefend.evaluate(tmp_path / "runs", skip_bad=True, **options).results[0][0].n == 5
    (failure,) = vlmdefend.evaluate(tmp_path / "runs", **options).failures
    assert "0.png" in failure.message


def test_a_model_that_cannot_be_loaded_is_recorded_until_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    options = {"model": ["ViT-B/32", "tiny-rn"], "limit": 4, "eps": "4/255,8/255", "steps": 1, "threads": 1}
    found = vlmdefend.evaluate(tmp_path / "runs", **options)
    assert [failure.what for failure in found.failures] == ["model ViT-B/32"]
    assert len(found.results) == 2
    errors = [record for record, _ in load_runs([tmp_path / "runs"]) if record.status == "error"]
    assert [record.cell.model for record in errors] == ["ViT-B/32"] * 2
    assert all("--weights" in (record.error or "") for record in errors)

    real = run_module.load_model
    monkeypatch.setattr(run_module, "load_model", lambda name, **_: real("tiny-vit", device=torch.device("cpu")))
    assert not vlmdefend.evaluate(tmp_path / "runs", **options).failures
    assert all(record.status == "done" for record, _ in load_runs([tmp_path / "runs"]))
    shutil.rmtree(tmp_path / "runs")
