"""The Python interface does what the command does."""

from __future__ import annotations

from pathlib import Path

import pytest

import vlmdefend
from vlmdefend.errors import UnknownName, UserError


def test_the_public_names_are_there() -> None:
    assert set(vlmdefend.__all__) == {"__version__", "evaluate", "load_dataset", "load_model"}
    assert all(callable(getattr(vlmdefend, name)) for name in vlmdefend.__all__ if name != "__version__")
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        vlmdefend.nothing  # noqa: B018


def test_a_model_and_an_image_set_load_by_name() -> None:
    images = vlmdefend.load_dataset("fashion", limit=20)
    model = vlmdefend.load_model("tiny-vit", device="cpu")
    classifier = model.zero_shot(images.class_names, images.templates)
    assert len(images) == 20
    assert classifier.num_classes == len(images.class_names) == 10


def test_evaluate_returns_every_cell_with_its_rows_and_resumes(tmp_path: Path) -> None:
    options = {"model": "tiny-vit", "attack": ["none", "pgd"], "eps": "4/255", "limit": 20, "device": "cpu"}
    found = vlmdefend.evaluate(out=tmp_path, **options)
    assert not found.failures
    assert [(record.cell.attack, len(rows)) for record, rows in found.results] == [("none", 20), ("pgd", 20)]
    assert all(record.robust == sum(row.robust for row in rows) for record, rows in found.results)
    again = vlmdefend.evaluate(out=str(tmp_path), **options)
    assert again.reused == 2
    assert again.results == found.results


def test_evaluate_takes_a_list_a_value_or_text_with_commas(tmp_path: Path) -> None:
    plain = {"attack": "none", "limit": 8, "device": "cpu"}
    for seeds in ([0, 1], "0,1", (0, 1)):
        assert len(vlmdefend.evaluate(out=tmp_path, seed=seeds, **plain).results) == 2


def test_evaluate_raises_what_the_command_prints(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="did you mean 'pgd'"):
        vlmdefend.evaluate(out=tmp_path, attack="pgdd")
    with pytest.raises(UserError, match="did you mean 'limit'"):
        vlmdefend.evaluate(out=tmp_path, limits=3)
