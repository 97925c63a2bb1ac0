"""Import paths and names of version 0.1 keep working, and say where things are now."""

from __future__ import annotations

import importlib
import sys

import pytest

from vlmdefend.moved import new_place
from vlmdefend.moved_names import MODULES, NAMES


@pytest.mark.parametrize(
    ("old", "name", "place"),
    [
        ("attacks.goal", "Goal", "attacks.criterion.Criterion"),
        ("attacks.pgd", "Pgd", "attacks.gradient.pgd.Pgd"),
        ("attacks.base", "Attacked", "attacks.base.AttackResult"),
        ("attacks.view", "Ledger", "attacks.view.QueryCount"),
        ("attacks.adaptive", "bpda", "attacks.bpda.bpda"),
        ("evaluation.grid", "Grid", "evaluation.grid.grid.Grid"),
        ("evaluation.deployed", "Deployed", "evaluation.cell.defended_model.DefendedModel"),
        ("evaluation.listener", "Listener", "progress.Progress"),
        ("evaluation.run", "evaluate", "evaluation.launchers.inline.evaluate"),
        ("models.zero_shot", "ZeroShotClassifier", "models.zero_shot.classifier.ZeroShotClassifier"),
        ("training.loop", "Run", "training.loop.trainer.Trainer"),
    ],
)
def test_an_old_name_is_the_new_one_and_warns(old: str, name: str, place: str) -> None:
    module, _, new = place.rpartition(".")
    expected = getattr(importlib.import_module(f"vlmdefend.{module}"), new)
    sys.modules.pop(f"vlmdefend.{old}", None) if old in MODULES and old != "evaluation.grid" else None
    with pytest.warns(DeprecationWarning, match=rf"is now vlmdefend\.{place}; change the import"):
        found = getattr(importlib.import_module(f"vlmdefend.{old}"), name)
    assert found is expected


def test_every_old_module_leads_to_one_that_exists() -> None:
    for old in {*MODULES, *NAMES}:
        assert new_place(old).startswith("vlmdefend.")
    for new in set(MODULES.values()):
        assert importlib.util.find_spec(f"vlmdefend.{new}") is not None, new


@pytest.mark.parametrize("old", sorted(NAMES))
def test_every_old_name_is_found(old: str) -> None:
    module = importlib.import_module(f"vlmdefend.{old}")
    for name in NAMES[old]:
        with pytest.warns(DeprecationWarning, match="change the import"):
            assert getattr(module, name) is not None


def test_what_never_was_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("vlmdefend.attacks.never_there")
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = importlib.import_module("vlmdefend.attacks.goal").nothing
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = importlib.import_module("vlmdefend.attacks.base").nothing
