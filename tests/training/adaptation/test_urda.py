"""Robust adaptation from end to end: every method, any teacher, and that it goes on where it stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.training.adaptation.domains import CLASSES, Heard, adaptation, run, saved_teacher, weights_of, write_domains
from vlmdefend.defenses.adaptation import ADAPTATIONS
from vlmdefend.errors import UserError
from vlmdefend.models import load_model

STEP_ONE = [c.name for c in ADAPTATIONS if c.role == "adaptation" and c.trains]

STEP_TWO = [c.name for c in ADAPTATIONS if c.role == "robustification"]


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
