"""Robust adaptation from end to end: what reaches it, what it leaves alone, and that it goes on where it stopped."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.urda_sets import CLASSES, Heard, adaptation, saved_teacher, weights_of, write_domains
from vlmdefend.data import load_dataset
from vlmdefend.defenses.adaptation import ADAPTATIONS
from vlmdefend.errors import UserError
from vlmdefend.models import load_model
from vlmdefend.training import urda, urda_sets
from vlmdefend.training.listener import Listener
from vlmdefend.training.stage import Optimization

STEP_ONE = [c.name for c in ADAPTATIONS if c.role == "adaptation" and c.trains]
STEP_TWO = [c.name for c in ADAPTATIONS if c.role == "robustification"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_domains(tmp_path_factory.mktemp("domains"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_teacher(tmp_path_factory.mktemp("teacher"))


def run(root: Path, out: Path, **options: Any) -> urda.Adapted:
    return adaptation(root, out, **options).run(Listener())


def relabelled(monkeypatch: pytest.MonkeyPatch, domain: str, split: str) -> None:
    """Give the images of a domain the labels of one another, as the set is opened."""

    def opened(name: str, which: str = "test", **options: Any) -> Any:
        found = load_dataset(name, which, **options)
        if name.endswith(domain) and which == split:
            found = replace(found, labels=tuple((label + 1) % len(CLASSES) for label in found.labels))
        return found

    monkeypatch.setattr(urda_sets, "load_dataset", opened)


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


@pytest.mark.parametrize("init", ["teacher", "imagenet"])
def test_the_teacher_stays_to_the_bit_and_all_of_the_student_trains(
    root: Path, tmp_path: Path, teacher: str, init: str
) -> None:
    folder = Path(teacher.removeprefix("local-dir:"))
    before, hashed = weights_of(folder), load_model(teacher, device="cpu").weights_hash
    ready = adaptation(root, tmp_path / "out", teacher=teacher, init=init)
    begun = ready._fresh(16) if init == "imagenet" else load_model(teacher, device="cpu").clip
    begun = {name: tensor.clone() for name, tensor in begun.state_dict().items()}
    ready.run(Listener())
    assert weights_of(folder) == before
    facts = json.loads((tmp_path / "out" / "vlmdefend.json").read_text())
    assert facts["teacher_weights_hash"] == hashed
    after = load_model(f"local-dir:{tmp_path / 'out'}", device="cpu").clip.state_dict()
    still = [name for name in begun if "num_batches" not in name and torch.equal(begun[name], after[name])]
    assert still == []


def test_released_weights_of_the_backbone_learn_at_a_tenth_of_the_rate(root: Path, tmp_path: Path) -> None:
    from vlmdefend.training.student import make_optimizer, update
    from vlmdefend.training.urda_student import AdaptedStudent

    ready = adaptation(root, tmp_path / "out")
    student = AdaptedStudent(ready._fresh(16), (ADAPTATIONS.create("mdd"),), ready.processes, backbone_factor=0.1)
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
    from vlmdefend.training.urda_student import AdaptedStudent

    ready = adaptation(root, tmp_path / "out")
    student = AdaptedStudent(ready._fresh(16), (ADAPTATIONS.create("srouda"),), ready.processes)
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


# every method


@pytest.mark.parametrize("name", STEP_ONE)
def test_every_method_of_step_one_trains_a_teacher(root: Path, tmp_path: Path, name: str) -> None:
    heard = Heard()
    ready = adaptation(root, tmp_path / "out", method=name, robustify="none", epochs_teacher=1)
    found = ready.run(heard)
    assert found.after is None
    assert found.before.clean.n == 12
    assert heard.lines
    assert all(line["gradient_norm"] > 0 for line in heard.lines)
    assert load_model(f"local-dir:{tmp_path / 'out'}", device="cpu").class_names == CLASSES


@pytest.mark.parametrize("name", STEP_TWO)
def test_every_method_of_step_two_trains_a_student(root: Path, tmp_path: Path, teacher: str, name: str) -> None:
    heard = Heard()
    ready = adaptation(root, tmp_path / "out", robustify=name, teacher=teacher, epochs_student=1)
    found = ready.run(heard)
    assert {end.stage for end in heard.epochs} == {"student"}
    assert found.after.worst.hits <= min(found.after.clean.hits, found.after.true_labels.hits)
    assert weights_of(tmp_path / "out") != weights_of(Path(teacher.removeprefix("local-dir:")))


def test_source_training_alone_needs_no_teacher(root: Path, tmp_path: Path) -> None:
    heard = Heard()
    found = adaptation(root, tmp_path / "out", robustify="vat", init="imagenet").run(heard)
    assert found.before is None
    assert {end.stage for end in heard.epochs} == {"student"}


# teachers


def test_a_clip_teaches_a_student_with_a_head(root: Path, tmp_path: Path) -> None:
    options = {"method": "zero-shot", "backbone": "tiny-vit", "init": "imagenet", "epochs_student": 1}
    found = run(root, tmp_path / "out", **options)
    model = load_model(f"local-dir:{tmp_path / 'out'}", device="cpu")
    assert model.classifier.width == load_model("tiny-vit", device="cpu").model_cfg["embed_dim"]
    assert model.classifier.bottleneck_kind == "linear"
    assert found.before is not None


def test_any_python_callable_teaches(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_teacher.py").write_text(
        "def make(class_names):\n"
        "    def teacher(images):\n"
        "        means = images.mean(dim=(2, 3))\n"
        "        return means[:, :1] * 0 + means, means\n"
        "    return teacher\n"
        "def wrong(class_names):\n"
        "    return lambda images: images.mean(dim=(1, 2, 3))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    options = {"init": "imagenet", "epochs_student": 1}
    found = run(root, tmp_path / "out", teacher="python:my_teacher:make", **options)
    assert found.before is not None
    for name, message in (
        ("python:my_teacher:wrong", r"returned \(\d+,\) for"),
        ("python:my_teacher:missing", "cannot be imported"),
        ("python:my_teacher", "write python:MODULE:FUNCTION"),
        ("python:os:getcwd", "does not take the class names"),
    ):
        with pytest.raises(UserError, match=message):
            run(root, tmp_path / name.replace(":", "-"), teacher=name, **options)


def test_a_student_cannot_begin_as_a_teacher_without_a_head(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--init teacher: tiny-vit .*--init imagenet"):
        run(root, tmp_path / "out", teacher="tiny-vit")


# going on


@pytest.mark.parametrize("at", [("teacher", 4), ("student", 1), ("student", 4)])
@pytest.mark.parametrize("select", ["last", "agreement"])
def test_a_run_that_was_killed_goes_on_to_the_same_bits(
    root: Path, tmp_path: Path, at: tuple[str, int], select: str
) -> None:
    options = {"save_every": 2, "select": select, "held_out": 0 if select == "last" else 6, "method": "mdd"}
    whole = run(root, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        adaptation(root, tmp_path / "killed", **options).run(Heard(at=at))
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    again = run(root, tmp_path / "killed", **options)
    assert weights_of(tmp_path / "killed") == weights_of(tmp_path / "whole")
    assert (again.before, again.after, again.theory) == (whole.before, whole.after, whole.theory)
    assert not again.reused


def test_a_finished_run_is_found_done_and_other_settings_are_refused(root: Path, tmp_path: Path, teacher: str) -> None:
    first = run(root, tmp_path / "out", teacher=teacher)
    weights = weights_of(tmp_path / "out")
    heard = Heard()
    again = adaptation(root, tmp_path / "out", teacher=teacher).run(heard)
    assert again.reused
    assert heard.lines == []
    assert (again.before, again.after, again.theory) == (first.before, first.after, first.theory)
    assert weights_of(tmp_path / "out") == weights
    with pytest.raises(UserError, match=r"holds a run with eps = '0.1', now it is '0.05'"):
        run(root, tmp_path / "out", teacher=teacher, eps="0.05")


# sets


def test_domains_of_other_classes_are_refused(root: Path, tmp_path: Path) -> None:
    other = write_domains(tmp_path / "other", train=2, test=2)
    for split in ("train", "test"):
        (other / "dark" / split / "bar").rename(other / "dark" / split / "tree")
    with pytest.raises(UserError, match="'bar' is in one of them only"):
        adaptation(root, tmp_path / "out", target=f"folder:{other / 'dark'}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "dart-urda"}, "give it as --robustify dart-urda"),
        ({"robustify": "mdd"}, "give it as --method mdd"),
        ({"robustify": "dart"}, "did you mean"),
        ({"robustify": "at-pl", "ablate": ("features",)}, "at-pl has no such terms"),
        ({"select": "agreement", "held_out": 24}, "has 24 training images"),
        ({"alpha": "eps/x"}, "--alpha eps/x"),
        ({"epochs_student": 0}, "--epochs-student 0"),
        ({"profile": "paper"}, "write released or scaled"),
        ({"ablate": ("defense", "prediction", "features")}, "all three terms"),
        ({"augment": "mirror"}, "--augment mirror"),
        ({"batch_size_student": 1}, "--batch-size-student 1: BatchNorm"),
        ({"eval_limit": 3}, "3 images to measure on"),
    ],
)
def test_bad_input_is_one_sentence(root: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        adaptation(root, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_run_does_not_go_on_under_another_teacher(root: Path, tmp_path: Path) -> None:
    name = saved_teacher(tmp_path / "teacher")
    run(root, tmp_path / "out", teacher=name)
    saved_teacher(tmp_path / "teacher", seed=8)
    with pytest.raises(UserError, match="holds a run with teacher_weights"):
        run(root, tmp_path / "out", teacher=name)
