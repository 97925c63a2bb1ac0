"""The prompt tower gives the classifier's own features for its own words, exact gradients, and short prompts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.models.conftest import is_one_sentence
from vlmdefend.errors import UserError
from vlmdefend.models import load_model
from vlmdefend.models.clip.vision_language import VisionLanguageModel
from vlmdefend.models.prompts.prompt_tower import PromptTower
from vlmdefend.models.zero_shot import text_side
from vlmdefend.models.zero_shot.text_side import ensembled

CLASSES = ("cat", "ankle boot", "t-shirt")
TEMPLATES = ("a photo of a {c}.", "the {c}", "{c}!")


def loaded(folders: dict[str, Path], kind: str = "vit") -> VisionLanguageModel:
    return load_model(f"local-dir:{folders[kind]}", device="cpu")


def tower_of(model: VisionLanguageModel, templates: tuple[str, ...] = TEMPLATES) -> PromptTower:
    side = model.zero_shot(CLASSES, templates).text_side
    assert side is not None
    return PromptTower(side)


def contexts(tower: PromptTower, count: int = 2) -> torch.Tensor:
    """(count, T, F, W) other context for each image."""
    noise = torch.randn(count, *tower.context.shape, generator=torch.Generator().manual_seed(0))
    return tower.context + 0.1 * noise.to(tower.context.dtype)


@pytest.mark.parametrize("kind", ["vit", "rn", "siglip", "coca"])
def test_the_templates_own_words_give_the_classifiers_features(kind: str, folders: dict[str, Path]) -> None:
    model = loaded(folders, kind)
    tower = tower_of(model)
    assert tower.context.shape == (3, 4, 32)  # "a photo of a"
    found = tower(tower.context.expand(2, -1, -1, -1))
    assert torch.allclose(found, model.text_features(CLASSES, TEMPLATES).expand(2, -1, -1), atol=1e-6)


@pytest.mark.parametrize("kind", ["vit", "rn", "siglip", "coca"])
def test_other_context_is_read_in_place_of_the_words_before_the_name(kind: str, folders: dict[str, Path]) -> None:
    """Against the whole tower, padding included, on embeddings exchanged by hand."""
    tower = tower_of(loaded(folders, kind))
    side, context = tower.side, contexts(tower)
    embeddings = side.table[side.tokens].expand(2, -1, -1, -1, -1).clone()  # (B, C, T, L, W)
    embeddings[:, :, 0, 1:5] = context[:, None, 0]  # start, a, photo, of, a
    embeddings[:, :, 1, 1:2] = context[:, None, 1, :1]  # start, the
    for image in range(2):
        prompts = side.encode(side.tokens.flatten(0, 1), embeddings[image].flatten(0, 1))
        assert torch.allclose(tower(context)[image], ensembled(prompts.view(3, 3, -1)), atol=1e-5)


def test_padding_is_left_out_only_where_the_tower_looks_backwards(folders: dict[str, Path]) -> None:
    assert tower_of(loaded(folders, "vit"))._tokens.shape[1] == 10  # start, a, photo, of, a, t, -, shirt, ., end
    assert tower_of(loaded(folders, "siglip"))._tokens.shape[1] == 16


@pytest.mark.parametrize("templates", [TEMPLATES, TEMPLATES[:1]])
@pytest.mark.parametrize("at_once", [256, 4])
def test_the_gradient_in_parts_is_that_of_autograd(
    templates: tuple[str, ...], at_once: int, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(folders)
    model.clip.double()
    tower = tower_of(model, templates)
    context = contexts(tower).requires_grad_(True)
    wanted = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (expected,) = torch.autograd.grad(tower(context), context, wanted)
    monkeypatch.setattr(text_side.parts_of, "__defaults__", (at_once,))
    with torch.no_grad():
        found = tower.gradient(context, wanted)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)
    assert expected[:, 0].abs().min() > 0
    if len(templates) > 1:
        assert not expected[:, 1, 1:].any()  # "the" is one word
        assert not expected[:, 2].any()  # nothing stands before the name


def test_nothing_to_tune_is_said_in_one_sentence(folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="before the class name") as caught:
        tower_of(loaded(folders), ("{c}!",))
    assert is_one_sentence(str(caught.value))
