from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch
from torch import Tensor

from vlmdefend.errors import UserError
from vlmdefend.models import load_model
from vlmdefend.models.clip.vision_language import VisionLanguageModel

CLASSES, TEMPLATES = [f"class {i}" for i in range(23)], ["a photo of a {c}.", "{c}", "a {c} {in} braces"]


@pytest.fixture
def model(folders: dict[str, Path]) -> VisionLanguageModel:
    return load_model(f"local-dir:{folders['vit']}", device="cpu")


@pytest.mark.parametrize("kind", ["vit", "siglip", "coca"])
def test_text_features_are_ensembled_as_open_clip_does(folders: dict[str, Path], kind: str) -> None:
    name = f"local-dir:{folders[kind]}"
    expected = open_clip.build_zero_shot_classifier(
        open_clip.create_model(name).eval(),
        open_clip.get_tokenizer(name),
        CLASSES,
        [lambda c, t=t: t.replace("{c}", c) for t in TEMPLATES],
    ).T
    features = load_model(name, device="cpu").text_features(CLASSES, TEMPLATES)
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(23))
    assert features.dtype == torch.float32


def test_texts_are_encoded_once_per_classes_and_templates(
    model: VisionLanguageModel, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, encode = [], model.clip.encode_text
    monkeypatch.setattr(model.clip, "encode_text", lambda *a, **k: calls.append(1) or encode(*a, **k))
    classifier = model.zero_shot(CLASSES, TEMPLATES)
    for _ in range(3):
        classifier(images)
    model.zero_shot(tuple(CLASSES), tuple(TEMPLATES), normalization="imagenet")
    assert len(calls) == 1
    model.text_features(CLASSES[:5], TEMPLATES)
    assert len(calls) == 2


def test_a_trained_image_tower_keeps_the_texts_and_a_trained_text_tower_does_not(model: VisionLanguageModel) -> None:
    first = model.text_features(CLASSES, TEMPLATES)
    model.clip.visual.proj.add_(0.1)
    assert model.text_features(CLASSES, TEMPLATES) is first
    model.clip.text_projection.add_(torch.randn_like(model.clip.text_projection))
    assert not torch.equal(model.text_features(CLASSES, TEMPLATES), first)


def test_weights_hash_tells_weights_apart_and_follows_them(
    folders: dict[str, Path], model: VisionLanguageModel
) -> None:
    first = model.weights_hash
    assert len(first) == 16
    assert first == model.weights_hash == load_model(f"local-dir:{folders['vit']}", device="cpu").weights_hash
    model.clip.visual.proj[0, 0] += 1e-3
    assert model.weights_hash != first
    model.clip.visual.proj[0, 0] -= 1e-3
    assert load_model(f"local-dir:{folders['siglip']}", device="cpu").weights_hash != first


def test_prompts_hash_depends_on_every_word_and_the_order(model: VisionLanguageModel) -> None:
    first = model.prompts_hash(["a", "b"], ["{c}"])
    assert first == VisionLanguageModel.prompts_hash(("a", "b"), ("{c}",))
    others = [(["b", "a"], ["{c}"]), (["a", "b"], ["{c}."]), (["a"], ["b", "{c}"]), (["a", "b", "{c}"], [])]
    assert len({first, *(model.prompts_hash(*other) for other in others)}) == 5


def test_a_loaded_model_is_frozen_float32_and_knows_its_pixels(model: VisionLanguageModel) -> None:
    assert not model.clip.training
    assert {p.dtype for p in model.clip.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in model.clip.parameters())
    assert (model.image_size, model.mean, model.std) == (32, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
    assert (model.interpolation, model.device) == ("bicubic", torch.device("cpu"))


@pytest.mark.parametrize(
    ("classes", "templates", "words"),
    [([], ["{c}"], "class list is empty"), (["a"], [], "no prompt template"), (["a"], ["a {}"], r"has no \{c\}")],
)
def test_prompts_that_mean_nothing_are_refused(
    model: VisionLanguageModel, classes: list[str], templates: list[str], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        model.zero_shot(classes, templates)
