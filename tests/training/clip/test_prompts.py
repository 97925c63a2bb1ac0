"""Tests of trained prompts: which parameters change, how often the text tower runs, and which options are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training.clip.test_train_methods import training
from tests.training.conftest import CLASSES, EPS, TEMPLATES, batch_of, classifier, student_of
from vlmdefend.defenses.training_time import OBJECTIVES
from vlmdefend.errors import UserError
from vlmdefend.models import load_model
from vlmdefend.models.clip.vision_language import VisionLanguageModel
from vlmdefend.models.prompts.context import ContextReader
from vlmdefend.rng import ImageRng
from vlmdefend.training.clip.prompts import choose_prompts
from vlmdefend.training.clip.student import ClipStudent
from vlmdefend.training.loop.stage import Optimization
from vlmdefend.training.loop.update import Accumulator, make_optimizer, update

CASES = [
    ("apt", "context:4", "rn"),
    ("apt", "context:4", "vit"),
    ("apt:prompting=constant", "class-context:2", "vit"),
    ("apt:prompting=perturbed", "context:4", "vit"),
    ("advpt", "context:4", "rn"),
    ("advpt", "class-context:2", "vit"),
    ("fap", "deep:2", "vit"),
    ("fap", "deep:3x1", "vit"),
]


def loaded(folders: dict[str, Path], kind: str) -> VisionLanguageModel:
    return load_model(f"local-dir:{folders[kind]}", device="cpu")


def one_step(method: str, student: ClipStudent, count: int = 6, micro_batch: int | None = None) -> None:
    objective, batch = OBJECTIVES.create(method, eps=EPS, alpha=EPS / 2, steps=2), batch_of(count)
    options = Optimization(batch_size=count, micro_batch=micro_batch)
    Accumulator(student, None, options).gradients(objective, batch, ImageRng(0, batch.ids, "test"))
    update(student, make_optimizer(student.parameters, options), 0.1, 1.0)
    student.refresh()


def attacked_logits(student: ClipStudent, images: Tensor) -> Tensor:
    with torch.no_grad():
        return student.attacked(images)


@pytest.mark.parametrize(("method", "parts", "kind"), CASES)
def test_prompts_change_and_no_weight_does_and_the_deployed_model_has_the_trained_logits(
    method: str, parts: str, kind: str, folders: dict[str, Path]
) -> None:
    model, original = loaded(folders, kind), loaded(folders, kind)
    student, images = student_of(model, parts), batch_of(3).images
    start = {name: p.detach().clone() for name, p in student.parameters.items()}
    assert start
    assert set(dict(model.clip.named_parameters())) == set(dict(original.clip.named_parameters())) | set(start)
    for _ in range(2):
        one_step(method, student)
    assert all(not torch.equal(p, start[name]) for name, p in student.parameters.items() if p.numel())
    frozen = {name: p for name, p in model.clip.named_parameters() if name not in start}
    assert not any(p.requires_grad or p.grad is not None for p in frozen.values())
    state = original.clip.state_dict()
    assert all(torch.equal(v, state[name]) for name, v in model.clip.state_dict().items() if name in state)
    assert model.prompts is not None
    original.add_prompts(model.prompts.deployed())
    assert set(dict(original.prompts.named_parameters())) <= {"context", "visual", "text"}  # type: ignore[union-attr]
    assert torch.allclose(attacked_logits(student, images), classifier(original)(images).logits, atol=1e-4)


def test_deep_prompts_are_maps_between_the_towers(folders: dict[str, Path]) -> None:
    """The random model has one block in each tower: the only tokens are the context and its image."""
    model = loaded(folders, "vit")
    expected = model.text_features(CLASSES, TEMPLATES)
    student = student_of(model, "deep:2")
    assert torch.allclose(student.class_features, expected, atol=1e-5)  # starts at the template's own words
    assert sorted(student.parameters) == [
        "prompts.context",
        "prompts.deep",
        "prompts.to_image.bias",
        "prompts.to_image.weight",
    ]
    prompts = model.prompts
    assert prompts is not None
    assert prompts.visual_shape == (1, 2)


def test_deep_prompts_of_the_embedded_vit_have_the_depth_of_its_towers_at_most() -> None:
    made = training_classifier("tiny-vit")
    parameters = choose_prompts(made, "deep:2", seed=0)
    assert parameters is not None
    prompts = made.model.prompts
    assert prompts is not None
    assert (prompts.visual_shape, prompts.text_depth) == ((4, 2), 1)  # 4 blocks of the image tower, 2 of the text tower
    assert torch.equal(prompts.visual_tokens(2), parameters["prompts.deep"][1])
    mapped = parameters["prompts.to_text.0.weight"] @ parameters["prompts.deep"][0].T
    assert torch.allclose(prompts.text_tokens(1), mapped.T + parameters["prompts.to_text.0.bias"], atol=1e-5)


def training_classifier(name: str) -> Any:
    return classifier(load_model(name, device="cpu"))


@pytest.mark.parametrize(
    ("method", "parts"), [("apt", "context:4"), ("apt:prompting=constant", "context:4"), ("fap", "deep:2")]
)
def test_the_text_tower_reads_the_prompts_once_a_step(
    method: str, parts: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    student, calls = student_of(loaded(folders, "vit"), parts), []
    read = ContextReader.__call__

    def counted(self: ContextReader, context: Tensor) -> Tensor:
        calls.append(1)
        return read(self, context)

    monkeypatch.setattr(ContextReader, "__call__", counted)
    for _ in range(3):
        one_step(method, student)
    assert len(calls) == 3


def test_a_batch_in_parts_has_the_gradient_of_the_whole(folders: dict[str, Path]) -> None:
    for method, parts in (("apt", "context:4"), ("fap", "deep:2")):
        found = []
        for micro_batch in (None, 2):
            student = student_of(loaded(folders, "vit"), parts)
            one_step(method, student, micro_batch=micro_batch)
            found.append(torch.cat([p.detach().flatten() for p in student.parameters.values()]))
        assert torch.allclose(*found, atol=1e-5), method


def test_the_start_is_a_function_of_the_seed_and_leaves_the_global_state_alone(folders: dict[str, Path]) -> None:
    state = torch.get_rng_state()
    made = [
        choose_prompts(classifier(loaded(folders, "vit")), parts, seed)
        for parts in ("context:4", "deep:2")
        for seed in (0, 0, 1)
    ]
    assert torch.equal(torch.get_rng_state(), state)
    for same, again, other in (made[:3], made[3:]):
        name = list(same or {})[-1]
        assert torch.equal(same[name], again[name])  # type: ignore[index]
        assert not torch.equal(same[name], other[name])  # type: ignore[index]


def test_all_weights_may_train_under_a_learned_context_and_it_with_them(folders: dict[str, Path]) -> None:
    model, before = loaded(folders, "vit"), loaded(folders, "vit").clip.state_dict()
    choose_prompts(classifier(model), "context:2", seed=0)
    model.clip.requires_grad_(False)
    context = model.context.detach().clone()  # type: ignore[union-attr]
    student = student_of(model, "all")
    one_step("tecoa", student)
    assert not torch.equal(model.context, context)  # type: ignore[arg-type]
    assert not torch.equal(model.clip.token_embedding.weight, before["token_embedding.weight"])
    found = model.zero_shot(CLASSES, TEMPLATES)
    assert torch.allclose(student.class_features, found.text_features, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "parts", "message"),
    [
        ("vit", "context:0", "write context: and a whole number from 1, such as context:16"),
        ("vit", "context:4x2", "write context: and a whole number from 1"),
        ("vit", "deep:2x", "write deep: and a whole number from 1"),
        ("vit", "class-context:x", "write class-context: and a whole number from 1"),
        ("vit", "context:14", "the model reads 16; shorten"),
        ("vit", "deep:2x2", "tokens for 2 blocks, the image tower has 1"),
        ("vit", "deep:5", "4 tokens before the class name, fewer than the 5 vectors"),
        ("rn", "deep:2", "defined for a vision transformer, and this one is ModifiedResNet; choose a ViT"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(kind: str, parts: str, message: str, folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=message) as caught:
        choose_prompts(classifier(loaded(folders, kind)), parts, seed=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("apt", {"trains": "image"}, "apt learns prompts; write context:M or class-context:M"),
        ("fap", {"trains": "context:4"}, "fap learns prompts; write deep:M"),
        ("tecoa", {"trains": "context:4"}, "tecoa trains weights"),
        ("apt", {"mix": (0.5,)}, "no vanilla weights to be mixed with"),
    ],
)
def test_methods_that_learn_prompts_learn_nothing_else_and_others_learn_none(
    method: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        training(tmp_path / "out", method, **options)
