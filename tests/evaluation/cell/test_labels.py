"""Labels never reach a defense: called by other names, the same images get the same answers, to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import vlmdefend
from tests.defenses.cases import CASES, Case
from vlmdefend.data.base import ImageSet
from vlmdefend.evaluation.cell import defended_model
from vlmdefend.evaluation.cell.evaluator import CellEvaluator
from vlmdefend.evaluation.grid import plan
from vlmdefend.types import Batch, Outputs

ACTING = {case.name: case for case in CASES}.values()  # of each defense the last, with settings under which it acts
Answers = dict[str, tuple[list[float], int]]  # id -> clean logits, recorded prediction


@pytest.fixture
def answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Case, int], Answers]:
    """``answers(case, by)`` of eight images, all labels moved ``by`` classes; four after an attack on others."""
    load, rows = plan.load_dataset, CellEvaluator._rows
    heard: dict[str, Tensor] = {}

    def listening(evaluator: CellEvaluator, batch: Batch, clean: Outputs, *others: Any) -> Any:
        heard.update(zip(batch.ids, clean.logits, strict=True))
        return rows(evaluator, batch, clean, *others)

    def evaluated(case: Case, by: int) -> Answers:
        def moved(*arguments: Any, **options: Any) -> ImageSet:
            images = load(*arguments, **options)
            return replace(images, labels=tuple((label + by) % 10 for label in images.labels))

        heard.clear()
        monkeypatch.setattr(plan, "load_dataset", moved)
        found = vlmdefend.evaluate(
            tmp_path / str(by), defense=case.text, model=case.model, limit=8, batch_size=4, attack="fgsm",
            attacker="whitebox", eps="4/255", threads=1, device="cpu",
        )  # fmt: skip
        ((_record, recorded),) = found.results
        return {row.id: (heard[row.id].tolist(), row.clean_prediction) for row in recorded}

    monkeypatch.setattr(CellEvaluator, "_rows", listening)
    monkeypatch.setattr(defended_model, "FEW", 1)
    return evaluated


@pytest.mark.parametrize("case", ACTING, ids=lambda case: case.text)
def test_predictions_of_a_defense_do_not_depend_on_the_labels(
    case: Case, answers: Callable[[Case, int], Answers]
) -> None:
    told, misled = answers(case, 0), answers(case, 3)
    assert len(told) == 8
    assert told == misled
