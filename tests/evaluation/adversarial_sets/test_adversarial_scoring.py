"""Models are scored on a saved set as if they had been attacked, and nothing is attacked."""

from __future__ import annotations

from pathlib import Path

import pytest

import vlmdefend
from tests.evaluation.saved_sets import OPTIONS, craft, score
from vlmdefend.evaluation.adversarial_sets.adversarial_set import AdversarialSet
from vlmdefend.evaluation.adversarial_sets.crafting import craft_set
from vlmdefend.evaluation.cell.evaluator import CellEvaluator
from vlmdefend.evaluation.grid.grid import Grid
from vlmdefend.evaluation.make_plan import make_plan
from vlmdefend.progress import Progress
from vlmdefend.rng import ImageRng


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
    monkeypatch.setattr(CellEvaluator, "run", lambda *args: pytest.fail("computed again"))
    assert len(score(home / "tiny-vit", tmp_path / "runs", model="tiny-rn")) == 1


def test_a_strong_saved_attack_on_a_pipeline_is_not_taken_for_a_transfer_that_beats_the_gradient(
    tmp_path: Path,
) -> None:
    from vlmdefend.reporting import verdict_rows

    options = {**OPTIONS, "limit": 60, "batch_size": 60}
    plan = make_plan(Grid.build({"eps": "8/255", "attack": "pgd:steps=20", "attacker": "adaptive"}, options))
    craft_set(plan, tmp_path / "set", Progress())
    weak = vlmdefend.evaluate(tmp_path / "runs", attack="fgsm", eps="8/255", **options).results
    strong = score(tmp_path / "set", tmp_path / "runs")
    assert strong[0][0].robust < weak[0][0].robust - 6
    (line,) = verdict_rows([*weak, *strong])
    assert not [reason for reason in line.reasons if reason.kind.startswith("transfer")]
    assert line.worst is not None
    assert line.worst.counts[0] <= strong[0][0].robust
