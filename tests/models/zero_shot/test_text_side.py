"""The text side gives the classifier's own features, exact gradients, and leaves no trace."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.attacks.spoken import Tokenizer
from tests.models.conftest import is_one_sentence
from vlmdefend.errors import UserError
from vlmdefend.models import load_model
from vlmdefend.models.clip.vision_language import VisionLanguageModel
from vlmdefend.models.zero_shot.text_side import TextSide, ensembled

CLASSES = ("cat", "ankle boot", "t-shirt")
TEMPLATES = ("a photo of a {c}.", "the {c}", "{c}!")


def loaded(folders: dict[str, Path], kind: str = "vit") -> VisionLanguageModel:
    return load_model(f"local-dir:{folders[kind]}", device="cpu")


def side_of(model: VisionLanguageModel, templates: tuple[str, ...] = TEMPLATES) -> TextSide:
    side = model.zero_shot(CLASSES, templates).text_side
    assert side is not None
    return side


@pytest.mark.parametrize("kind", ["vit", "rn", "siglip", "coca"])
def test_features_of_the_clean_tokens_are_the_classifiers(kind: str, folders: dict[str, Path]) -> None:
    model = loaded(folders, kind)
    side = side_of(model)
    assert side.tokens.shape == (3, 3, 16)
    assert torch.allclose(side.features(side.tokens), model.text_features(CLASSES, TEMPLATES), atol=1e-6)


@pytest.mark.parametrize("kind", ["vit", "siglip", "coca"])
def test_the_gradient_is_that_of_a_one_hot_relaxation(kind: str, folders: dict[str, Path]) -> None:
    """A finite difference: mix a little of another token into one place of one prompt."""
    model = loaded(folders, kind)
    model.clip.double()
    side = side_of(model)
    want = torch.randn(3, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = torch.tensor([4, 0])  # class 1, template 1; class 0, template 0
    gradient = side.gradient(side.tokens, rows, lambda classes: want)
    flat, place, token, step = side.tokens.flatten(0, 1), 2, side.token("dog"), 1e-5

    def loss(amount: float, row: int) -> float:
        embeddings = side.table[flat].clone()
        embeddings[row, place] += amount * side.table[token]  # one-hot + amount e_token, times the table
        features = side.encode(flat, embeddings).unflatten(0, side.tokens.shape[:2])
        return float((ensembled(features) * want).sum())

    for found, row in zip(gradient, rows.tolist(), strict=True):
        expected = (loss(step, row) - loss(-step, row)) / (2 * step)
        assert float(found[place] @ side.table[token]) == pytest.approx(expected, rel=1e-5)
        assert abs(expected) > 1e-7


def test_slots_are_the_template_and_never_the_class_name(folders: dict[str, Path]) -> None:
    side = side_of(loaded(folders))
    for number, columns in enumerate((["a", "photo", "of", "a", "."], ["the"], ["!"])):
        for c, name in enumerate(CLASSES):
            row, slots = side.tokens[c, number], side.slots[number][c]
            assert [side.decode(torch.tensor([0, int(row[i]), 49407])) for i in slots] == columns
            inside = range(1, int(side.ends_of(row)))
            left = [int(row[i]) for i in inside if i not in slots.tolist()]
            assert left == side._tokenizer.encode(name)


def test_a_class_name_that_repeats_the_template_stays_a_name(folders: dict[str, Path]) -> None:
    model = loaded(folders)
    side = model.zero_shot(("photo", "photo of a photo"), ("a photo of a {c}",)).text_side
    assert side is not None
    ends = side.ends
    assert (side.slots[0] < ends - 1).all()  # the last word is the name's
    assert side.slots[0].tolist() == [[1, 2, 3, 4]] * 2


def test_words_can_be_typed_and_nothing_special_is_usable(folders: dict[str, Path]) -> None:
    side = side_of(loaded(folders))
    words, everything = side.usable(words=True), side.usable(words=False)
    assert not (words & ~everything).any()
    assert not everything[side._tokenizer.all_special_ids].any()
    assert words[side.token("zebra")]
    longer = side.with_appended(side.tokens[:, 0], side.token("zebra"))
    typed = side._tokenizer([side.decode(row) for row in longer])
    assert torch.equal(typed, longer)
    assert side.decode(longer[0]) == "a photo of a cat . zebra"


def test_contexts_restore_the_features_even_after_an_exception(folders: dict[str, Path], images: torch.Tensor) -> None:
    classifier = loaded(folders).zero_shot(CLASSES, TEMPLATES)
    side, before = classifier.text_side, classifier.text_features
    assert side is not None
    clean = classifier(images).logits
    with side.using(before.roll(1, dims=0)):
        assert torch.allclose(classifier(images).logits, clean.roll(1, dims=1), atol=1e-5)
    with pytest.raises(UserError, match="images are"), side.using(before.roll(1, dims=0)):
        classifier(images[..., 1:])
    assert classifier.text_features is before
    assert not side._embedding._forward_hooks


def test_an_embedding_hook_is_gone_after_an_error(folders: dict[str, Path]) -> None:
    side = side_of(loaded(folders))
    with pytest.raises(RuntimeError):
        side.encode(side.tokens.flatten(0, 1), torch.zeros(9, 16, 7))
    assert not side._embedding._forward_hooks


def test_prompts_longer_than_the_context_are_refused(folders: dict[str, Path]) -> None:
    model = loaded(folders)
    long = model.zero_shot(("cat",), (" ".join(["very"] * 20) + " {c}",))
    with pytest.raises(UserError, match="has 23 tokens, the model reads 16") as refused:
        _ = long.text_side
    assert is_one_sentence(refused.value)
    full = model.zero_shot(("cat",), (" ".join(["very"] * 13) + " {c}",)).text_side
    assert full is not None
    with pytest.raises(UserError, match="already fills the model's context of 16 tokens") as refused:
        full.with_appended(full.tokens[0], 320)
    assert is_one_sentence(refused.value)


def test_another_text_tower_or_tokenizer_is_refused(folders: dict[str, Path]) -> None:
    model = loaded(folders)
    classifier = model.zero_shot(CLASSES, TEMPLATES)
    with pytest.raises(UserError, match=r"open_clip's own tokenizer") as refused:
        TextSide(classifier, lambda texts: torch.zeros(len(texts), 16), CLASSES, TEMPLATES)
    assert is_one_sentence(refused.value)
    del model.clip.token_embedding  # as in a Hugging Face tower
    with pytest.raises(UserError, match=r"open_clip's own text tower") as refused:
        TextSide(classifier, Tokenizer(), ("cat",), ("a photo of a {c}.",))
    assert is_one_sentence(refused.value)
