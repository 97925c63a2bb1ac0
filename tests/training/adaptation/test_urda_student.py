"""The student of step 2: what of it trains, at which rate, and what its teacher is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.training.adaptation.domains import Heard, adaptation, weights_of
from vlmdefend.defenses.adaptation import ADAPTATIONS
from vlmdefend.models import load_model
from vlmdefend.progress import Progress
from vlmdefend.training.loop.stage import Optimization


@pytest.mark.parametrize("init", ["teacher", "imagenet"])
def test_the_teacher_stays_to_the_bit_and_all_of_the_student_trains(
    root: Path, tmp_path: Path, teacher: str, init: str
) -> None:
    folder = Path(teacher.removeprefix("local-dir:"))
    before, hashed = weights_of(folder), load_model(teacher, device="cpu").weights_hash
    ready = adaptation(root, tmp_path / "out", teacher=teacher, init=init)
    begun = ready.new_classifier(16) if init == "imagenet" else load_model(teacher, device="cpu").clip
    begun = {name: tensor.clone() for name, tensor in begun.state_dict().items()}
    ready.run(Progress())
    assert weights_of(folder) == before
    facts = json.loads((tmp_path / "out" / "vlmdefend.json").read_text())
    assert facts["teacher_weights_hash"] == hashed
    after = load_model(f"local-dir:{tmp_path / 'out'}", device="cpu").clip.state_dict()
    still = [name for name in begun if "num_batches" not in name and torch.equal(begun[name], after[name])]
    assert still == []


def test_released_weights_of_the_backbone_learn_at_a_tenth_of_the_rate(root: Path, tmp_path: Path) -> None:
    from vlmdefend.training.adaptation.student import AdaptedStudent
    from vlmdefend.training.loop.update import make_optimizer, update

    ready = adaptation(root, tmp_path / "out")
    student = AdaptedStudent(
        ready.new_classifier(16), (ADAPTATIONS.create("mdd"),), ready.processes, backbone_factor=0.1
    )
    optimizer = make_optimizer(student.parameters, Optimization(), student.rate_factors)
    for parameter in student.parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    update(student, optimizer, 0.005, None)
    named = {id(p): name for name, p in student.parameters.items()}
    rates = {named[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert set(rates) == set(student.parameters)
    for name, rate in rates.items():
        assert rate == pytest.approx(0.0005 if name.startswith("classifier.backbone.") else 0.005)
    assert any(name.startswith("adversary.") for name in rates)


def test_sroudas_teacher_learns_at_a_ten_thousandth_of_the_rate(root: Path, tmp_path: Path) -> None:
    from vlmdefend.training.adaptation.student import AdaptedStudent

    ready = adaptation(root, tmp_path / "out")
    student = AdaptedStudent(ready.new_classifier(16), (ADAPTATIONS.create("srouda"),), ready.processes)
    beside = {name for name in student.parameters if name.startswith("teacher.")}
    assert len(beside) == len(list(student.classifier.parameters()))
    assert {student.rate_factors[name] for name in beside} == {1e-4}
    assert {student.rate_factors.get(name, 1.0) for name in set(student.parameters) - beside} == {1.0}


def test_the_first_terms_of_equal_student_and_teacher_at_eps_zero_are_equal_and_zero(
    root: Path, tmp_path: Path, teacher: str
) -> None:
    heard = Heard()
    ready = adaptation(root, tmp_path / "out", teacher=teacher, eps="0", alpha="0.05", batch_norm="frozen")
    ready.run(heard)
    first = heard.lines[0]
    assert first["defense"] == first["prediction"]
    assert first["prediction"] == pytest.approx(0.0, abs=1e-9)
    assert first["features"] == pytest.approx(0.0, abs=1e-9)
