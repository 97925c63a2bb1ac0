"""The labels of the target, and in step 2 those of the source, reach nothing that is trained or chosen."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.training.adaptation.domains import CLASSES, Heard, adaptation, run, weights_of
from vlmdefend.data import load_dataset
from vlmdefend.defenses.adaptation import ADAPTATIONS
from vlmdefend.training.adaptation import sets


def relabelled(monkeypatch: pytest.MonkeyPatch, domain: str, split: str) -> None:
    """Give the images of a domain the labels of one another, as the set is opened."""

    def opened(name: str, which: str = "test", **options: Any) -> Any:
        found = load_dataset(name, which, **options)
        if name.endswith(domain) and which == split:
            found = replace(found, labels=tuple((label + 1) % len(CLASSES) for label in found.labels))
        return found

    monkeypatch.setattr(sets, "load_dataset", opened)


# target labels


@pytest.mark.parametrize("select", ["last", "agreement", "entropy"])
@pytest.mark.parametrize("method", ["dann", "shot"])
def test_the_labels_of_the_target_change_nothing_at_all(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, select: str, method: str
) -> None:
    options = {"method": method, "select": select, "held_out": 0 if select == "last" else 6, "limit": 20}
    run(root, tmp_path / "true", **options)
    with monkeypatch.context() as patch:
        relabelled(patch, "dark", "train")
        run(root, tmp_path / "wrong", **options)
    assert weights_of(tmp_path / "true") == weights_of(tmp_path / "wrong")
    assert weights_of(tmp_path / "true" / "teacher") == weights_of(tmp_path / "wrong" / "teacher")


def test_with_the_oracle_they_do_and_the_result_says_so(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"select": "oracle", "held_out": 9}
    seen = []
    for name in ("true", "wrong"):
        with monkeypatch.context() as patch:
            if name == "wrong":
                relabelled(patch, "dark", "train")
            heard = Heard()
            adaptation(root, tmp_path / name, **options).run(heard)
        seen.append([end.held_out for end in heard.epochs])
    assert seen[0] != seen[1]
    assert json.loads((tmp_path / "true" / "vlmdefend.json").read_text())["selected_by"] == "oracle"


def test_no_objective_is_ever_given_a_target_label(
    root: Path, tmp_path: Path, teacher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, int]] = []
    cls = ADAPTATIONS.get("dart-dad")
    losses = cls.losses

    def spied(self: Any, student: Any, given: Any, batch: Any, rng: Any) -> Any:
        seen.extend(zip(batch.ids, batch.labels.tolist(), strict=True))
        return losses(self, student, given, batch, rng)

    monkeypatch.setattr(cls, "losses", spied)
    run(root, tmp_path / "out", robustify="dart-dad", teacher=teacher, epochs_student=1)
    assert {label for name, label in seen if name.startswith("target/")} == {-1}
    assert {label for name, label in seen if name.startswith("source/")} == {0, 1, 2}


# step 2


@pytest.mark.parametrize("name", ["dart-urda", "at-pl", "trades-pl"])
def test_step_two_does_not_depend_on_the_labels_of_the_source(
    root: Path, tmp_path: Path, teacher: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    run(root, tmp_path / "true", robustify=name, teacher=teacher)
    with monkeypatch.context() as patch:
        relabelled(patch, "light", "train")
        run(root, tmp_path / "wrong", robustify=name, teacher=teacher)
    assert weights_of(tmp_path / "true") == weights_of(tmp_path / "wrong")
