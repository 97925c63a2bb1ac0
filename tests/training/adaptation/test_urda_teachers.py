"""Teachers from timm: weights on this machine, classes by name, and what is said where they do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf

from tests.training.adaptation.domains import CLASSES, SIDE, adaptation, saved_teacher, write_domains
from vlmdefend.errors import UserError
from vlmdefend.models import load_model
from vlmdefend.progress import Progress
from vlmdefend.training.adaptation.teacher import load_teacher

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def network() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return timm.create_model("test_resnet", num_classes=3).eval()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_domains(tmp_path_factory.mktemp("domains"), train=4, test=2)


def written(folder: Path, network: Any, names: list[str] | None) -> str:
    """``network`` as timm writes it."""
    save_for_hf(network, folder, model_config={"label_names": names} if names else None, safe_serialization=True)
    return f"timm:local-dir:{folder}"


def test_its_logits_come_in_the_order_of_the_datas_classes(tmp_path: Path, network: Any) -> None:
    images = torch.rand(2, 3, 160, 160, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = network((images - 0.5) / 0.5)  # test_resnet's own mean and deviation
    teacher = load_teacher(written(tmp_path / "hub", network, ["square", "bar", "cross"]), CLASSES, (), CPU)
    assert torch.allclose(teacher(images).logits, expected[:, [1, 2, 0]], atol=1e-5)
    assert teacher(images).features is not None
    assert teacher.assumed == ""


def test_where_it_names_no_classes_their_order_is_assumed_and_that_is_said(tmp_path: Path, network: Any) -> None:
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    for name in (written(tmp_path / "hub", network, None), f"timm:test_resnet@{tmp_path / 'weights.safetensors'}"):
        teacher = load_teacher(name, CLASSES, (), CPU)
        assert teacher.assumed.startswith(f"{name} does not name its classes")
        assert "bar, cross, square" in teacher.assumed


def test_other_classes_are_refused_with_the_way_out(tmp_path: Path, network: Any) -> None:
    name = written(tmp_path / "hub", network, ["square", "bar", "tree"])
    with pytest.raises(
        UserError, match=r"'cross' is among its classes or the data's only; .* --backbone timm:"
    ) as caught:
        load_teacher(name, CLASSES, (), CPU)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="has 3 classes where the data have 2"):
        load_teacher(name, CLASSES[:2], (), CPU)


def test_a_classifier_or_a_clip_takes_the_place_of_step_one_under_the_datas_own_classes(tmp_path: Path) -> None:
    name = saved_teacher(tmp_path / "teacher")
    images = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    turned = load_teacher(name, ("square", "bar", "cross"), (), CPU)
    assert torch.equal(turned(images).logits, load_teacher(name, CLASSES, (), CPU)(images).logits[:, [2, 0, 1]])
    with pytest.raises(UserError, match=r"was trained for 3 classes \(bar, cross, square ...\).*'tree'"):
        load_teacher(name, ("bar", "cross", "tree"), (), CPU)
    clip = load_teacher("tiny-rn", ("bar", "cross", "tree"), ("a {c}.",), CPU)  # any class is text to it
    assert clip(images).logits.shape == (2, 3)


def test_it_teaches_and_is_never_changed(tmp_path: Path, root: Path, network: Any) -> None:
    name = written(tmp_path / "hub", network, list(CLASSES))
    ready = adaptation(root, tmp_path / "out", teacher=name, init="imagenet", epochs_student=1)
    assert ready.given is not None
    before = ready.given.weights_hash
    found = ready.run(Progress())
    assert ready.given.weights_hash == before
    assert found.before is not None
    student = load_model(f"local-dir:{tmp_path / 'out'}", device="cpu")
    assert student.classifier.width == network.num_features  # equal features can be asked for


def test_any_changed_weight_or_statistic_changes_the_hash(tmp_path: Path, network: Any) -> None:
    teacher = load_teacher(written(tmp_path / "hub", network, list(CLASSES)), CLASSES, (), CPU)
    hashes = {teacher.weights_hash}
    state = dict(teacher._hash.__closure__[0].cell_contents.state_dict())  # type: ignore[union-attr,attr-defined]
    for name in ("fc.bias", "bn1.running_mean"):
        state[name][0] += 1.0
        hashes.add(teacher.weights_hash)
    assert len(hashes) == 3


def test_a_timm_backbone_adapts_from_its_weights_in_both_steps(tmp_path: Path, root: Path, network: Any) -> None:
    name = written(tmp_path / "hub", network, None)
    ready = adaptation(root, tmp_path / "out", backbone=name, epochs_teacher=1, epochs_student=1, limit=8)
    begun = ready.new_classifier(16).backbone.state_dict()
    assert torch.equal(begun["conv1.0.weight"], network.state_dict()["conv1.0.weight"])
    ready.run(Progress())
    made = load_model(f"local-dir:{tmp_path / 'out'}", device="cpu")
    assert made.image_size == 160
    assert made.zero_shot(CLASSES, (), resize_inside=True)(torch.rand(1, 3, SIDE, SIDE)).logits.shape == (1, 3)
