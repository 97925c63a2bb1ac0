"""Cells under attacked prompts: clean with the clean ones, adversarial with the attacked ones, defense included."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from vlmdefend.attacks import ATTACKS
from vlmdefend.attacks.text_level.text import Text
from vlmdefend.attacks.view import View
from vlmdefend.data import load_dataset
from vlmdefend.data.loader import load_batch
from vlmdefend.data.transforms import PixelTransform
from vlmdefend.defenses.base import Defense, Paradigm, Recipe
from vlmdefend.errors import UserError
from vlmdefend.evaluation.adversarial_sets.crafting import check_plan
from vlmdefend.evaluation.cell.attackers import Variant, fit
from vlmdefend.evaluation.grid.grid import Grid
from vlmdefend.evaluation.launchers.inline import evaluate, run_plan
from vlmdefend.evaluation.make_plan import make_plan
from vlmdefend.evaluation.store.records import ImageRow, Record
from vlmdefend.evaluation.store.run_folder import Store
from vlmdefend.models import load_model
from vlmdefend.progress import Progress
from vlmdefend.reporting.verdicts.verdict import verdict_rows
from vlmdefend.rng import ImageRng
from vlmdefend.types import Outputs, Pipeline, Threat

TEXT = "text:candidates=16:beams=1"
CO = "co:candidates=16:beams=1:steps=3"
FASHION: dict[str, Any] = {"model": "tiny-vit", "dataset": "fashion", "limit": 40, "batch_size": 20}


def one(folder: Path, **grid: Any) -> tuple[Record, list[ImageRow]]:
    done = evaluate(folder, **{**FASHION, **grid})
    assert not done.failures
    ((record, rows),) = done.results
    return record, rows


def test_text_lowers_the_accuracy_and_says_with_which_prompts(tmp_path: Path) -> None:
    clean, _ = one(tmp_path, attack="none")
    record, rows = one(tmp_path, attack=TEXT, eps="1")
    assert record.clean_correct == clean.clean_correct
    assert record.robust < record.clean_correct
    assert all(row.distance == 0 for row in rows)
    assert record.set_level
    assert len(record.attacked_prompts) == 10
    start = "a photo of a t - shirt . "
    assert record.attacked_prompts[0].startswith(start)
    word = record.attacked_prompts[0].removeprefix(start)
    assert all(prompt.endswith(f" . {word}") for prompt in record.attacked_prompts)
    assert clean.attacked_prompts == []


def test_the_rows_are_those_of_the_recorded_prompts_typed_by_hand(tmp_path: Path) -> None:
    record, rows = one(tmp_path, attack=TEXT, eps="2")
    model = load_model("tiny-vit", device="cpu")
    data = load_dataset("fashion", "test", limit=40)
    batch, _ = load_batch(data, range(40), PixelTransform(model.image_size, model.interpolation), skip_bad=False)
    typed = model.zero_shot(record.attacked_prompts, ("{c}",))
    with torch.no_grad():
        predictions = typed(batch.images).logits.argmax(dim=1).tolist()
    assert [row.adversarial_prediction for row in rows] == predictions


def test_the_report_quotes_a_prompt(tmp_path: Path) -> None:
    result = one(tmp_path, attack=TEXT, eps="1")
    (line,) = verdict_rows([result])
    assert any(repr(result[0].attacked_prompts[0]) in note for note in line.notes)


def test_co_attacks_both_and_leaves_no_more_standing_than_its_text(tmp_path: Path) -> None:
    text, _ = one(tmp_path, attack=TEXT, eps="1")
    record, rows = one(tmp_path, attack=CO, eps="4/255")
    assert record.attacked_prompts == text.attacked_prompts
    assert record.robust <= text.robust
    assert max(row.distance for row in rows) <= 4 / 255 + 1e-6
    assert any(row.distance > 0 for row in rows)


@pytest.mark.parametrize("attack", [TEXT, CO])
def test_a_budget_of_zero_attacks_nothing(attack: str, tmp_path: Path) -> None:
    record, _ = one(tmp_path, attack=attack, eps="0")
    assert record.robust == record.clean_correct
    assert record.attacked_prompts == []


def test_a_transfer_attacker_learns_on_the_bare_model_and_meets_the_defense(tmp_path: Path) -> None:
    bare, bare_rows = one(tmp_path, attack=TEXT, eps="2")
    moved, rows = one(tmp_path, attack=TEXT, eps="2", defense="jpeg", attacker="transfer")
    assert moved.attacked_prompts == bare.attacked_prompts
    assert moved.robust < moved.clean_correct
    assert [r.adversarial_margin for r in rows] != [r.adversarial_margin for r in bare_rows]  # JPEG in between


class Stops(Progress):
    """Kills the run after so many images."""

    def __init__(self, after: int) -> None:
        self.left = after

    def advance(self, unit: Any, count: int = 1) -> None:
        self.left -= count
        if count and self.left <= 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("attack", "eps"), [(TEXT, "2"), (CO, "4/255")])
def test_a_resumed_run_repeats_the_fitted_prompts_and_the_result(attack: str, eps: str, tmp_path: Path) -> None:
    """Killed in the middle, and at the end; both are held against one uninterrupted run."""
    whole, rows = one(tmp_path / "whole", attack=attack, eps=eps)
    for after in (20, 40):
        plan, folder = make_plan(Grid.build({}, {**FASHION, "attack": attack, "eps": eps})), tmp_path / str(after)
        with pytest.raises(KeyboardInterrupt):
            run_plan(plan, Store(folder), Stops(after))
        again, again_rows = one(folder, attack=attack, eps=eps)
        assert again.attacked_prompts == whole.attacked_prompts
        assert again_rows == rows


@dataclass(frozen=True, kw_only=True)
class Misleading(Defense):
    """Its first surrogate sees nothing of the images, the second is exact."""

    name: ClassVar[str] = "misleading"
    paradigm: ClassVar[Paradigm] = "training-free"
    summary: ClassVar[str] = "a test's own"
    citation: ClassVar[str] = "–"
    recipe: ClassVar[Recipe] = Recipe("two surrogates", surrogates=2)

    def wrap(self, model: Pipeline) -> Pipeline:
        return model

    def surrogates(self, model: Pipeline) -> tuple[Pipeline, ...]:
        def swapped(images: Tensor, rng: ImageRng) -> Outputs:
            outputs = model(images, rng)
            return Outputs(outputs.logits.roll(1, dims=1), outputs.features)

        return Called(swapped, model.num_classes), model


class Called:
    stochastic = False

    def __init__(self, call: Callable[[Tensor, ImageRng], Outputs], num_classes: int) -> None:
        self._call, self.num_classes = call, num_classes

    def __call__(self, images: Tensor, rng: ImageRng) -> Outputs:
        return self._call(images, rng)


def test_of_several_surrogates_the_prompts_that_fool_most_images_of_the_deployed_pipeline_are_used() -> None:
    model = load_model("tiny-vit", device="cpu")
    data = load_dataset("fashion", "test", limit=30)
    batch, _ = load_batch(data, range(30), PixelTransform(model.image_size, model.interpolation), skip_bad=False)
    classifier = model.zero_shot(data.class_names, ("a photo of a {c}.",))
    fitted = fit(
        "adaptive",
        Text(candidates=16, beams=1),
        Misleading(),
        classifier,
        batch.images,
        batch.labels,
        Threat("tokens", 1.0),
        ImageRng(0, batch.ids),
        16,
    )
    assert list(fitted.attacks) == [Variant(0), Variant(1)]
    view = View(classifier, ImageRng(0, batch.ids), width=16)
    alone = Text(candidates=16, beams=1).fit(view, batch.images, batch.labels, Threat("tokens", 1.0))
    expected = alone.attacked_prompts(classifier.text_side)
    assert expected[0] != "a photo of a t - shirt ."
    assert all(attack.attacked_prompts(classifier.text_side) == expected for attack in fitted.attacks.values())


@pytest.mark.parametrize(
    ("attack", "eps", "message"),
    [(TEXT, "2", "changes the prompts, not the images"), (CO, "4/255", "changes the prompts too")],
)
def test_no_set_of_images_is_made_of_attacked_prompts(attack: str, eps: str, message: str) -> None:
    plan = make_plan(Grid.build({}, {**FASHION, "attack": attack, "eps": eps}))
    with pytest.raises(UserError, match=message):
        check_plan(plan)


def test_every_attack_that_changes_prompts_learns_them() -> None:
    assert {cls.name for cls in ATTACKS if cls.changes_prompts} >= {"text", "co"}
    assert all(ATTACKS.create(cls.name).learns_from > 0 for cls in ATTACKS if cls.changes_prompts)
