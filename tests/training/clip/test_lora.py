"""Tests of LoRA: its dropout, factors of the text tower, and a resumed ``adv-lora`` run with its perturbation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.training.clip.test_train_methods import Interrupt
from tests.training.conftest import CLASSES, TEMPLATES, batch_of, classifier
from vlmdefend.defenses.training_time import OBJECTIVES
from vlmdefend.defenses.training_time.adv_lora import DELTA
from vlmdefend.errors import UserError
from vlmdefend.models import load_model
from vlmdefend.models.clip.vision_language import VisionLanguageModel
from vlmdefend.progress import Progress
from vlmdefend.rng import ImageRng
from vlmdefend.training.clip.adapters import LowRank, choose_adapters
from vlmdefend.training.clip.student import ClipStudent
from vlmdefend.training.clip.training_job import DefenseTrainingJob
from vlmdefend.training.loop.processes import Processes
from vlmdefend.training.loop.stage import Optimization
from vlmdefend.training.loop.state_file import load_state
from vlmdefend.training.loop.trainer_state import STATE
from vlmdefend.training.loop.update import Accumulator
from vlmdefend.training.settings.train_settings import make_train_settings


@pytest.fixture
def vit(folders: dict[str, Path]) -> VisionLanguageModel:
    return load_model(f"local-dir:{folders['vit']}", device="cpu")


def adapted(model: VisionLanguageModel, parts: str) -> ClipStudent:
    """Returns a student whose LoRA factors are not 0, so that dropout has an effect."""
    made = classifier(model)
    parameters = choose_adapters(made, parts, seed=0)
    assert parameters
    with torch.no_grad():
        for name, parameter in parameters.items():
            if name.endswith(".up"):
                parameter.fill_(0.2)
    student = ClipStudent(made, parameters, Processes("cpu"))
    student.refresh()
    return student


def layers(model: VisionLanguageModel) -> list[LowRank]:
    return [module for module in model.clip.modules() if isinstance(module, LowRank)]


def test_dropout_zeroes_a_share_of_the_inputs_and_scales_up_the_rest() -> None:
    layer = LowRank(torch.zeros(3 * 4, 10_000), 3, 1, 0.25, torch.Generator().manual_seed(0))
    with torch.no_grad():
        layer.up.fill_(1.0)
    whole = layer(torch.zeros(12, 10_000))
    layer.drop(7)
    change = layer(torch.zeros(12, 10_000)) / whole
    for block in change.view(3, 4, -1)[:, 0]:
        kept = block != 0
        assert torch.allclose(block[kept], torch.tensor(4 / 3))
        assert float(kept.float().mean()) == pytest.approx(0.75, abs=0.02)
    assert not torch.equal(change[0] != 0, change[4] != 0)  # query and key have different masks
    layer.drop(None)
    assert torch.equal(layer(torch.zeros(12, 10_000)), whole)


def test_dropout_acts_in_the_training_forward_by_step_and_never_in_the_attacked_one(vit: VisionLanguageModel) -> None:
    student, images = adapted(vit, "lora-all:2:0.5"), batch_of(3).images
    with torch.no_grad():
        plain = student.attacked(images)
        first, again = student(images).logits, student(images).logits
        student.iteration = 1
        other = student(images).logits
        assert torch.equal(student.attacked(images), plain)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-4)
    assert not torch.allclose(first, plain, atol=1e-4)


def test_text_features_follow_the_text_towers_factors_and_only_where_it_has_any(vit: VisionLanguageModel) -> None:
    before = vit.text_features(CLASSES, TEMPLATES)
    student, images = adapted(vit, "lora-all:2"), batch_of(3).images
    assert not torch.allclose(student.class_features, before, atol=1e-3)
    assert torch.allclose(student(images).logits, student.attacked(images), atol=1e-5)
    student(images).logits[:, 0].sum().backward()
    text = [name for name in student.parameters if not name.startswith("visual.")]
    assert text
    assert all(student.parameters[name].grad is not None for name in text)


def test_lora_of_the_image_tower_encodes_no_text(vit: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    student, images = adapted(vit, "lora:2:0.25"), batch_of(3).images
    monkeypatch.setattr(vit.clip, "encode_text", lambda *args, **options: pytest.fail("text was encoded"))
    student(images).logits.sum().backward()
    student.refresh()
    student.attacked(images)


def test_a_text_tower_without_clips_attention_is_refused(vit: VisionLanguageModel) -> None:
    made = classifier(vit)
    vit.clip.transformer = nn.Identity()
    with pytest.raises(UserError, match="this text tower has no attention of CLIP's kind"):
        choose_adapters(made, "lora-all:2", seed=0)


# a run


def training(out: Path, **options: Any) -> DefenseTrainingJob:
    given = {"method": "adv-lora", "model": "tiny-vit", "device": "cpu", "out": out, "limit": 120, "held_out": 8}
    return DefenseTrainingJob(make_train_settings(given | {"epochs": 1, "batch_size": 24, "save_every": 2} | options))


def carried(out: Path) -> Tensor:
    return load_state(out / "training" / STATE)[0]["carried"][DELTA]


def test_an_interrupted_adv_lora_run_resumes_with_its_perturbation_to_the_same_bytes(tmp_path: Path) -> None:
    training(tmp_path / "whole").run(Progress())
    with pytest.raises(KeyboardInterrupt):
        training(tmp_path / "broken").run(Interrupt())
    assert carried(tmp_path / "broken").abs().max() > 0
    assert not torch.equal(carried(tmp_path / "broken"), carried(tmp_path / "whole"))
    training(tmp_path / "broken").run(Progress())
    assert torch.equal(carried(tmp_path / "broken"), carried(tmp_path / "whole"))
    whole, broken = (load_model(f"local-dir:{tmp_path / name}", device="cpu") for name in ("whole", "broken"))
    assert whole.weights_hash == broken.weights_hash
    vanilla = load_model("tiny-vit", device="cpu").clip.state_dict()
    moved = {k for k, v in whole.clip.state_dict().items() if not torch.equal(v, vanilla[k])}
    assert {name.startswith("visual.") for name in moved} == {True, False}
    assert all(name.endswith("attn.in_proj_weight") for name in moved)


def test_every_epoch_begins_without_a_perturbation(tmp_path: Path) -> None:
    run = training(tmp_path / "out", epochs=2, limit=60)
    seen: list[float] = []
    losses = type(run.settings.objective).losses

    def watched(self: Any, student: Any, *rest: Any) -> Any:
        seen.append(float(student.carried[DELTA].abs().max()) if student.carried else 0.0)
        return losses(self, student, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(run.settings.objective), "losses", watched)
        run.run(Progress())
    assert [size > 0 for size in seen] == [False, True, True, False, True, True]


def test_a_batch_that_does_not_fit_into_memory_is_not_halved_if_the_loss_needs_the_whole_batch(
    vit: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, batch, objective = adapted(vit, "lora:2"), batch_of(4), OBJECTIVES.create("at")

    def full(*args: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(type(objective), "losses", full)
    with pytest.raises(UserError, match="at needs the whole batch at once; give a smaller --batch-size"):
        Accumulator(student, None, Optimization()).gradients(objective, batch, ImageRng(0, batch.ids, "test"))


@pytest.mark.parametrize("method", ["at", "adv-lora"])
def test_a_method_that_needs_the_whole_batch_refuses_micro_batches(method: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"--method {method}: the loss of an image depends on the others of its batch"):
        training(tmp_path / "out", method=method, micro_batch=8)
    training(tmp_path / "out", method="adv-lora:perturbation=per-image", micro_batch=8)
