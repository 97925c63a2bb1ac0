"""Tests of training methods: which weights change, adapters folded into weights, and runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training.conftest import CLASSES, EPS, TEMPLATES, batch_of, classifier, student_of
from vlmdefend.defenses.training_time import OBJECTIVES
from vlmdefend.errors import UserError
from vlmdefend.models import load_model
from vlmdefend.models.clip.patches import with_patches
from vlmdefend.models.clip.vision_language import VisionLanguageModel
from vlmdefend.progress import Progress
from vlmdefend.rng import ImageRng
from vlmdefend.training.clip.adapters import choose_adapters, folded
from vlmdefend.training.clip.student import AutocastTeacher, ClipStudent
from vlmdefend.training.clip.training_job import DefenseTrainingJob
from vlmdefend.training.loop.processes import Processes
from vlmdefend.training.loop.stage import Optimization
from vlmdefend.training.loop.update import Accumulator, make_optimizer, update
from vlmdefend.training.settings.train_settings import make_train_settings
from vlmdefend.types import Batch

NAMES = [cls.name for cls in OBJECTIVES if cls.schedule is not None and not cls.learns]


def one_step(name: str, student: ClipStudent, original: VisionLanguageModel, batch: Batch) -> dict[str, float]:
    objective = OBJECTIVES.create(name, eps=EPS, alpha=EPS / 2, steps=2)
    teacher = None if objective.teacher == "none" else AutocastTeacher(classifier(original), student.processes)
    options = Optimization(batch_size=len(batch.ids))
    means = Accumulator(student, teacher, options).gradients(objective, batch, ImageRng(0, batch.ids, "test"))
    update(student, make_optimizer(student.parameters, options), 0.1, 1.0)
    student.refresh()
    return means


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["rn", "vit"])
def test_a_step_changes_the_image_tower_and_nothing_else(name: str, kind: str, folders: dict[str, Path]) -> None:
    model, original = (load_model(f"local-dir:{folders[kind]}", device="cpu") for _ in range(2))
    before, features = model.weights_hash, model.text_features(CLASSES, TEMPLATES)
    student, batch = student_of(model), batch_of(6)
    one_step(name, student, original, batch)  # from the vanilla weights, where a distance to them may have no gradient
    one_step(name, student, original, batch)
    moved = {k for k, v in model.clip.state_dict().items() if not torch.equal(v, original.clip.state_dict()[k])}
    assert moved
    assert all(k.startswith("visual.") and "running" not in k and "num_batches" not in k for k in moved)
    assert original.weights_hash == before
    assert torch.equal(model.text_features(CLASSES, TEMPLATES), features)


def test_fare_and_sim_clip_do_not_read_the_labels(target: VisionLanguageModel) -> None:
    batch = batch_of(4)
    other = batch._replace(labels=(batch.labels + 1) % len(CLASSES))
    for name in ("fare", "sim-clip", "agft"):
        objective, original = OBJECTIVES.create(name, eps=EPS, steps=2), classifier(target)
        found = [
            sum(objective.losses(student_of(target), original, b, ImageRng(0, b.ids, "test")).losses.values())
            for b in (batch, other)
        ]
        assert torch.equal(*found), name


def test_more_steps_of_fares_attack_take_the_features_further_away(target: VisionLanguageModel) -> None:
    batch, original = batch_of(8), classifier(target)

    def distance(steps: int) -> Tensor:
        objective = OBJECTIVES.create("fare", eps=EPS, alpha=EPS / 4, steps=steps)
        return objective.losses(student_of(target), original, batch, ImageRng(0, batch.ids, "t")).losses["distance"]

    found = [float(distance(steps).mean().detach()) for steps in (0, 2, 10)]
    assert 0 < found[0] < found[1] < found[2]


# patches


@pytest.mark.parametrize(("kind", "count"), [("rn", 1), ("vit", 4)])
def test_with_patches_returns_the_models_own_features_and_a_vector_for_each_patch(
    kind: str, count: int, folders: dict[str, Path]
) -> None:
    model = classifier(load_model(f"local-dir:{folders[kind]}", device="cpu"))
    images = batch_of(3).images
    found, patches = model.with_patches(images)
    assert torch.allclose(found.logits, model(images).logits, atol=1e-5)
    assert patches.shape == (3, count, model.text_features.shape[1])


def test_an_image_tower_of_another_kind_is_refused() -> None:
    with pytest.raises(UserError, match="Linear pools in its own way; use a model with CLIP's own"):
        with_patches(torch.nn.Linear(2, 2), torch.zeros(1, 3, 4, 4))


# adapters


def adapted(model: VisionLanguageModel, parts: str) -> ClipStudent:
    made = classifier(model)
    parameters = choose_adapters(made, parts, seed=0)
    assert parameters
    return ClipStudent(made, parameters, Processes("cpu"))


@pytest.mark.parametrize(
    ("kind", "parts"), [("vit", "lora:2"), ("rn", "lora:2:0.5"), ("vit", "lora-all:2:0.25"), ("vit", "prompt:4")]
)
def test_adapters_start_without_effect_train_alone_and_fold_into_a_plain_model_of_the_same_logits(
    kind: str, parts: str, folders: dict[str, Path]
) -> None:
    model, original, plain = (load_model(f"local-dir:{folders[kind]}", device="cpu") for _ in range(3))
    batch, student = batch_of(6), adapted(model, parts)
    assert torch.allclose(student.attacked(batch.images), classifier(original).forward(batch.images).logits, atol=1e-6)
    for _ in range(2):
        one_step("tecoa", student, original, batch)
    own = {n: p for n, p in model.clip.named_parameters() if n not in student.parameters}
    assert not any(p.requires_grad or p.grad is not None for p in own.values())
    state = folded(model.clip, plain.clip.state_dict())
    moved = {name for name, weight in state.items() if not torch.equal(weight, original.clip.state_dict()[name])}
    image = ("visual.transformer.", "visual.attnpool.")
    places = {"prompt": "visual.positional_embedding", "lora": image, "lora-all": (*image, "transformer.")}
    expected = places[parts.partition(":")[0]]
    assert all(name.startswith(expected) for name in moved)
    assert {name.startswith("visual.") for name in moved} == ({True, False} if "all" in parts else {True})
    plain.clip.load_state_dict(state)
    with torch.no_grad():
        first, with_adapter, folded_in = (
            logits(batch.images)
            for logits in (student_of(original).attacked, student.attacked, student_of(plain).attacked)
        )
    assert (with_adapter - folded_in).abs().max() < 0.02 * (with_adapter - first).abs().max()


def test_a_visual_prompt_is_a_border_added_to_the_normalised_image(folders: dict[str, Path]) -> None:
    model, original = (load_model(f"local-dir:{folders['vit']}", device="cpu") for _ in range(2))
    student, images = adapted(model, "prompt:4"), batch_of(3).images
    (border,) = student.parameters.values()
    with torch.no_grad():
        border.normal_(generator=torch.Generator().manual_seed(0))
        plain = classifier(original)
        mask = torch.ones(32, 32)
        mask[4:28, 4:28] = 0
        pixels = (images - plain.mean) / plain.std + mask * border
        expected = original.clip.encode_image(pixels)
        assert torch.allclose(student.attacked_features(images), expected, atol=1e-4)


def test_lora_is_the_product_of_two_thin_matrices_over_the_root_of_the_rank(folders: dict[str, Path]) -> None:
    model, original = (load_model(f"local-dir:{folders['vit']}", device="cpu") for _ in range(2))
    student = adapted(model, "lora:2")
    down, up = (next(p for n, p in student.parameters.items() if n.endswith(end)) for end in (".down", ".up"))
    assert down.shape == (3, 2, 32)
    assert up.shape == (3, 32, 2)
    with torch.no_grad():
        up[1] = 0.5  # the keys alone
    name = "visual.transformer.resblocks.0.attn.in_proj_weight"
    change = folded(model.clip, [name])[name] - original.clip.state_dict()[name]
    assert torch.allclose(change[32:64], (0.5 / 2**0.5 * down[1].sum(dim=0)).detach().expand(32, 32), atol=1e-6)
    assert change[:32].abs().max() == 0
    assert change[64:].abs().max() == 0


@pytest.mark.parametrize(
    ("kind", "parts", "message"),
    [
        ("vit", "lora:0", "write lora: and a whole number from 1"),
        ("vit", "lora:33", "rank 33 is more than 32, the width of the image tower's attention"),
        ("vit", "lora:2:1", "the dropout after the rank must be a number from 0 to below 1"),
        ("vit", "lora-all:2:x", "the dropout after the rank must be a number from 0 to below 1"),
        ("vit", "prompt:4:0.5", "write prompt: and a whole number from 1"),
        ("vit", "prompt:x", "write prompt: and a whole number from 1"),
        ("vit", "prompt:16", "the border covers all 32 x 32 pixels; give a narrower one"),
        ("rn", "prompt:4", "choose a ViT, or --trains image"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(kind: str, parts: str, message: str, folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=message):
        choose_adapters(classifier(load_model(f"local-dir:{folders[kind]}", device="cpu")), parts, seed=0)


# runs


def training(out: Path, method: str, **options: Any) -> DefenseTrainingJob:
    given = {"method": method, "model": "tiny-vit", "device": "cpu", "out": out, "held_out": 60, "limit": 300}
    return DefenseTrainingJob(make_train_settings(given | options))


class Interrupt(Progress):
    """Interrupts the run after step 3."""

    def advance(self, unit: Any, count: int = 1) -> None:
        if unit["step"] == 3:
            raise KeyboardInterrupt


def test_an_interrupted_run_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    options = {"epochs": 1, "batch_size": 24, "save_every": 2, "trains": "lora:2", "limit": 120, "held_out": 8}
    weights = "open_clip_model.safetensors"
    training(tmp_path / "whole", "pmg-aft", **options).run(Progress())
    with pytest.raises(KeyboardInterrupt):
        training(tmp_path / "broken", "pmg-aft", **options).run(Interrupt())
    assert not (tmp_path / "broken" / weights).exists()
    training(tmp_path / "broken", "pmg-aft", **options).run(Progress())
    whole, broken = (load_model(f"local-dir:{tmp_path / name}", device="cpu") for name in ("whole", "broken"))
    assert whole.weights_hash == broken.weights_hash
    assert whole.weights_hash != load_model("tiny-vit", device="cpu").weights_hash


def test_a_mixture_lies_between_the_vanilla_and_the_trained_weights(tmp_path: Path) -> None:
    options = {"epochs": 1, "limit": 80, "held_out": 8}
    training(tmp_path / "out", "tecoa", **options).run(Progress())
    again = training(tmp_path / "out", "tecoa", mix=(0.25,), **options).run(Progress())  # of a run that is done
    assert list(again.summary) == ["vanilla", "result", "mix-0.25"]
    models = [load_model(name, device="cpu") for name in ("tiny-vit", f"local-dir:{tmp_path / 'out'}")]
    vanilla, trained = (model.clip.state_dict() for model in models)
    mixed = load_model(f"local-dir:{tmp_path / 'out' / 'mix-0.25'}", device="cpu").clip.state_dict()
    for name, weight in mixed.items():
        assert torch.allclose(weight, 0.75 * vanilla[name] + 0.25 * trained[name], atol=1e-6), name
