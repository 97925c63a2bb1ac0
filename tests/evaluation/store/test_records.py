"""The key of a cell covers everything that can change its result."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from tests.evaluation.conftest import FIELDS, cell
from vlmdefend.evaluation.store.records import Cell, Checks, Cost, ImageRow, Record


def other(value: Any) -> Any:
    """Another value of the same type."""
    choices = {"whitebox": "transfer", "linf": "l2", "cpu": "cuda"}
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return choices.get(value, f"{value} ")
    return {**value, "steps": 11} if isinstance(value, dict) else value + 1


@pytest.mark.parametrize("field", list(Cell.model_fields))
def test_any_other_field_is_another_key(field: str) -> None:
    before = cell()
    changed = before.model_copy(update={field: other(getattr(before, field))})
    assert changed.key != before.key


def test_the_least_change_of_a_radius_or_an_option_is_another_key() -> None:
    assert cell(eps=4 / 255).key != cell(eps=4 / 255 + 1e-16).key
    assert cell(attack_config={"steps": 10}).key != cell(attack_config={"steps": "10"}).key
    assert cell(attack_config={"a": 1, "b": 2}).key == cell(attack_config={"b": 2, "a": 1}).key


def test_no_two_cells_of_a_grid_share_a_key() -> None:
    cells = [
        cell(eps=k / 255, seed=s, attacker=a) for k in range(20) for s in range(5) for a in ("transfer", "whitebox")
    ]
    assert len({c.key for c in cells}) == len(cells)


def test_the_key_is_the_same_today_and_tomorrow() -> None:
    """A change here makes every finished run start anew: raise the schema version if that is meant."""
    assert Cell(**FIELDS).key == Cell.model_validate_json(Cell(**FIELDS).model_dump_json()).key
    assert len(cell().key) == 16
    assert set(cell().key) <= set("0123456789abcdef")


def test_a_record_survives_being_written() -> None:
    record = Record(key=cell().key, cell=cell(eps=1 / 3), status="done", n=3, cost=Cost(clean_seconds=0.1 + 0.2))
    assert Record.model_validate_json(record.model_dump_json()) == record
    assert Record.model_validate(json.loads(record.model_dump_json())).cell.key == record.cell.key


@pytest.mark.parametrize("fields", [{"eps": float("nan")}, {"eps": -1.0}, {"n": 0}, {"attacker": "me"}, {"new": 1}])
def test_a_cell_that_makes_no_sense_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        cell(**fields)


def row(label: int, clean: int, adversarial: int) -> ImageRow:
    return ImageRow(
        id="a",
        label=label,
        clean_prediction=clean,
        clean_margin=0.0,
        adversarial_prediction=adversarial,
        adversarial_margin=0.0,
        distance=0.0,
        steps=0,
    )


def test_robust_is_right_before_and_after() -> None:
    assert row(1, 1, 1).robust
    assert not row(1, 1, 2).robust
    assert not row(1, 2, 1).robust, "an attack cannot make a wrong image robust"
    assert not row(1, 2, 2).robust


def test_costs_add_up_and_the_peak_is_the_largest() -> None:
    total = Cost(clean_images=2, attack_seconds=1.0, peak_memory_mb=5.0) + Cost(clean_images=3, peak_memory_mb=4.0)
    assert total == Cost(clean_images=5, attack_seconds=1.0, peak_memory_mb=5.0)


def test_checks_add_up_and_a_doubt_once_raised_stays() -> None:
    total = Checks(zero_gradients=2, forwards_differ=True) + Checks(zero_gradients=3)
    assert total == Checks(zero_gradients=5, forwards_differ=True)
