"""Cases that could make results look better than they are: a misleading surrogate, changed files, a missing model."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from PIL import Image
from torch import Tensor

import vlmdefend
from tests.evaluation.conftest import Verdict, cell
from vlmdefend.attacks.gradient.pgd import Pgd
from vlmdefend.data.loader import load_batch
from vlmdefend.data.transforms import PixelTransform
from vlmdefend.defenses.base import Defense, Paradigm, Recipe, TransformedInput
from vlmdefend.evaluation.cell import surrogates
from vlmdefend.evaluation.cell.attackers import BARE, Variant, WatchedView, craft
from vlmdefend.evaluation.cell.defended_model import DefendedModel
from vlmdefend.evaluation.launchers import inline as run_module
from vlmdefend.reporting import load_runs
from vlmdefend.rng import ImageRng
from vlmdefend.types import Outputs, Pipeline, Threat


@dataclass(frozen=True, kw_only=True)
class Rolled(Defense):
    """Deploys the bare model, but gives the attacker a surrogate that shifts the image."""

    name: ClassVar[str] = "rolled"
    paradigm: ClassVar[Paradigm] = "training-free"
    summary: ClassVar[str] = "a surrogate that predicts something else"
    citation: ClassVar[str] = "–"
    recipe: ClassVar[Recipe] = Recipe("misleading")

    def wrap(self, model: Pipeline) -> Pipeline:
        return model

    def surrogate(self, model: Pipeline) -> Pipeline:
        return TransformedInput(model, lambda images, rng: images.roll(3, dims=-1))


def test_a_surrogate_with_other_values_also_attacks_the_images_it_misclassifies() -> None:
    model = vlmdefend.load_model("tiny-rn", device="cpu")
    images = vlmdefend.load_dataset("fashion", limit=40)
    batch = load_batch(images, range(40), PixelTransform(model.image_size), skip_bad=False)[0]
    classifier = model.zero_shot(images.class_names, ["a photo of a {c}."])
    rng, threat = ImageRng(0, batch.ids, "attacker"), Threat("linf", 8 / 255)
    attacks = {Variant(): Pgd(steps=3)}
    arguments = ("adaptive", attacks, Rolled(), classifier, batch.images, batch.labels, threat, rng, 16)
    assert (craft(*arguments).steps == 0).any()  # believed, it lets images go that the deployed model gets right
    assert (craft(*arguments, stop=False).steps == 3).all()

    assert not surrogates.agree(DefendedModel(cell(attacker="adaptive", batch_size=16), classifier, Rolled()), batch)
    assert surrogates.agree(DefendedModel(cell(attacker="transfer", batch_size=16), classifier, Rolled()), batch)


@dataclass(frozen=True, kw_only=True)
class Gated(Defense):
    """Shifts what lies off the 255 levels, as no clean image does; its surrogate never shifts."""

    name: ClassVar[str] = "gated"
    paradigm: ClassVar[Paradigm] = "training-free"
    summary: ClassVar[str] = "acts on attacked images only"
    citation: ClassVar[str] = "–"
    recipe: ClassVar[Recipe] = Recipe("misleading")

    def wrap(self, model: Pipeline) -> Pipeline:
        def shifted(images: Tensor, rng: ImageRng) -> Tensor:
            return torch.where(off_the_levels(images)[:, None, None, None], images.roll(1, dims=-1), images)

        return TransformedInput(model, shifted)

    def surrogate(self, model: Pipeline) -> Pipeline:
        return model


def off_the_levels(images: Tensor) -> Tensor:
    levels = images.detach() * 255
    return (levels - levels.round()).abs().flatten(1).amax(dim=1) > 1e-3


def test_an_image_that_only_the_surrogate_misclassifies_is_attacked_to_the_end(
    verdict: Verdict,
) -> None:
    record, rows = verdict(defense=Gated(), attacker="adaptive", attack=Pgd(steps=5), eps=60 / 255)
    standing = [row for row in rows if row.robust]
    assert standing
    assert all(row.steps >= 5 for row in standing)
    assert record.checks.outside_budget == 0
    assert any(0 < row.steps < 5 for row in rows)  # others may still leave early


@dataclass(frozen=True, kw_only=True)
class Evades(Defense):
    """Answers what the attack finds on the bare model with no numbers; its surrogate never shows them."""

    name: ClassVar[str] = "evades"
    paradigm: ClassVar[Paradigm] = "training-free"
    summary: ClassVar[str] = "not a number off the 255 levels"
    citation: ClassVar[str] = "–"
    recipe: ClassVar[Recipe] = Recipe("bare only", bare=True)

    def wrap(self, model: Pipeline) -> Pipeline:
        return Evaded(model)


class Evaded:
    def __init__(self, model: Pipeline) -> None:
        self.model, self.num_classes, self.stochastic = model, model.num_classes, model.stochastic

    def __call__(self, images: Tensor, rng: ImageRng) -> Outputs:
        return Outputs(torch.where(off_the_levels(images)[:, None], torch.nan, self.model(images, rng).logits))


def test_examples_of_the_bare_model_with_logits_that_are_not_numbers_are_flagged() -> None:
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).mul(255).round().div(255)
    model = Halves()
    labels, ids = torch.zeros(4, dtype=torch.int64), [str(i) for i in range(4)]
    threat, rng = Threat("linf", 2.5 / 255), ImageRng(0, ids, "attacker")
    for variants in ({Variant(BARE): Pgd(steps=2)}, {Variant(): Pgd(steps=2)}):
        assert not craft("adaptive", variants, Evades(), model, images, labels, threat, rng, 4).finite
    rounded = {Variant(BARE): Pgd(steps=2)}
    assert craft("adaptive", rounded, Rolled(), model, images, labels, threat, rng, 4).finite


class Halves:
    """The logits are the means over the halves of the pixels; the first class starts ahead."""

    num_classes = 2
    stochastic = False

    def __call__(self, images: Tensor, rng: ImageRng) -> Outputs:
        halves = images.flatten(1).unflatten(1, (2, -1)).mean(dim=2)
        return Outputs(halves + torch.tensor([0.5, 0.0]))


def test_what_is_watched_is_written_to_one_place_which_a_replayed_graph_writes_again() -> None:
    images, rng = torch.rand(2, 3, 8, 8), ImageRng(0, ["a", "b"])
    watched = WatchedView(Halves())
    watched(images, rng)
    place = watched._finite
    watched(images * torch.nan, rng)
    watched(images, rng)
    assert watched._finite is place
    assert not watched.finite


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
