"""Learned prompts: the towers read them where they should, a folder keeps them, and nobody drops them in silence."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.models.conftest import is_one_sentence
from vlmdefend.errors import UserError
from vlmdefend.models import load_model
from vlmdefend.models.backbone_names import load_backbone
from vlmdefend.models.clip.folder import save_folder
from vlmdefend.models.clip.patches import with_patches
from vlmdefend.models.clip.vision_language import VisionLanguageModel
from vlmdefend.models.prompts.context import ContextReader
from vlmdefend.models.prompts.learned_prompts import LearnedPrompts, places
from vlmdefend.models.prompts.prompt_tower import PromptTower
from vlmdefend.models.zero_shot.text_tower import encode_embedded

CLASSES = ("cat", "ankle boot", "t-shirt")
TEMPLATES = ("a photo of a {c}.",)


def loaded(folders: dict[str, Path], kind: str = "vit") -> VisionLanguageModel:
    return load_model(f"local-dir:{folders[kind]}", device="cpu")


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def with_context(model: VisionLanguageModel, *shape: int, **options: Any) -> VisionLanguageModel:
    model.add_prompts(LearnedPrompts(template=places(shape[-2]), context=noise(*shape), **options))
    return model


def prompted(folders: dict[str, Path]) -> VisionLanguageModel:
    model = loaded(folders)
    parts: dict[str, Any] = {"context": noise(2, 32), "visual": noise(2, 2, 64), "text": noise(1, 2, 32)}
    model.add_prompts(LearnedPrompts(template="a photo of a {c}.", **parts))
    return model


def image_by_hand(model: VisionLanguageModel, images: Tensor, tokens: Tensor) -> Tensor:
    """(D, N, V) tokens in the first D blocks of the image tower of a model without prompts, written out."""
    tower, depth = model.clip.visual, len(tokens)
    patches = tower.conv1(images).flatten(2).transpose(1, 2)
    start = tower.class_embedding.expand(len(images), 1, -1)
    x = torch.cat([start, patches], dim=1) + tower.positional_embedding
    x = tower.ln_pre(torch.cat([x, tokens[0].expand(len(images), -1, -1)], dim=1))
    for number, block in enumerate(tower.transformer.resblocks):
        if 0 < number < depth:
            x = torch.cat([x[:, :17], tokens[number].expand(len(images), -1, -1)], dim=1)
        x = block(x)
    found: Tensor = tower.ln_post(x)[:, 0] @ tower.proj
    return found


@pytest.mark.parametrize("depth", [1, 2])
def test_visual_tokens_stand_behind_the_patches_and_others_take_their_place_deeper(
    depth: int, folders: dict[str, Path], images: Tensor
) -> None:
    model, tokens = loaded(folders), noise(depth, 3, 64)
    vanilla = model.clip.encode_image(images)
    model.add_prompts(LearnedPrompts(visual=tokens))
    found = model.clip.encode_image(images)
    assert torch.allclose(found, image_by_hand(loaded(folders), images, tokens), atol=1e-5)
    assert (found - vanilla).abs().max() > 0.01
    pooled, places_of = with_patches(model.clip.visual, images)
    assert torch.allclose(pooled, found, atol=1e-5)
    assert places_of.shape == (3, 16, 32)  # the places of the image, and no tokens


def test_deep_text_vectors_take_the_place_of_the_context_from_the_second_block_on(folders: dict[str, Path]) -> None:
    model, context, deep = loaded(folders), noise(2, 32), noise(1, 2, 32)
    model.add_prompts(LearnedPrompts(template=TEMPLATES[0], context=context, text=deep))
    clip, tokens = loaded(folders).clip, model.tokenizer([f"a photo of a {name}." for name in CLASSES])
    x = clip.token_embedding(tokens)
    x[:, 1:3] = context
    first, second = clip.transformer.resblocks
    x = first(x + clip.positional_embedding, attn_mask=clip.attn_mask)
    x[:, 1:3] = deep[0]
    x = clip.ln_final(second(x, attn_mask=clip.attn_mask))[torch.arange(3), tokens.argmax(dim=1)]
    expected = F.normalize(x @ clip.text_projection, dim=1)
    assert torch.allclose(model.text_features(CLASSES, TEMPLATES), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["vit", "rn", "siglip", "coca"])
def test_a_context_of_the_templates_own_words_changes_nothing(kind: str, folders: dict[str, Path]) -> None:
    model = loaded(folders, kind)
    expected = model.text_features(CLASSES, TEMPLATES)
    words = ContextReader(model.clip, model.tokenizer, CLASSES, *TEMPLATES, 4).words
    model.add_prompts(LearnedPrompts(template=TEMPLATES[0], context=words))
    found = model.text_features(CLASSES, ("another {c}", "and {c} another"))  # its prompt is its own
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["vit", "rn", "siglip", "coca"])
@pytest.mark.parametrize("shape", [(4, 32), (3, 4, 32)])
def test_a_context_is_read_in_the_places_before_the_name(
    shape: tuple[int, ...], kind: str, folders: dict[str, Path]
) -> None:
    model, context = loaded(folders, kind), noise(*shape)
    tokens = model.tokenizer([f"X X X X {name}." for name in CLASSES])
    embeddings = model.zero_shot(CLASSES, TEMPLATES).text_side.table[tokens].clone()  # type: ignore[union-attr]
    embeddings[:, 1:5] = context
    expected = encode_embedded(model.clip, tokens, embeddings)  # padding included
    model = with_context(model, *shape, class_names=CLASSES if len(shape) == 3 else None)
    assert torch.allclose(model.text_features(CLASSES, TEMPLATES), expected, atol=1e-5)


def test_prompts_are_encoded_again_only_when_they_changed(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls, read = with_context(loaded(folders), 4, 32), [], ContextReader.__call__

    def counted(self: ContextReader, context: Tensor) -> Tensor:
        calls.append(1)
        return read(self, context)

    monkeypatch.setattr(ContextReader, "__call__", counted)
    first = model.text_features(CLASSES, TEMPLATES)
    assert model.text_features(CLASSES, TEMPLATES) is first
    assert len(calls) == 1
    with torch.no_grad():
        model.context.neg_()  # type: ignore[union-attr]
    assert not torch.allclose(model.text_features(CLASSES, TEMPLATES), first)
    assert len(calls) == 2


# attacks on the prompts, and defenses that tune them


def test_the_text_side_of_a_learned_context_has_its_features_and_offers_words_alone(folders: dict[str, Path]) -> None:
    model = with_context(loaded(folders), 4, 32)
    classifier = model.zero_shot(CLASSES, ("the {c}", "some {c}"))
    side = classifier.text_side
    assert side is not None
    assert torch.allclose(side.features(side.tokens), classifier.text_features, atol=1e-6)
    assert [slots.shape[1] for slots in side.slots] == [1]  # the full stop: a learned vector is no word
    model.clip.double()
    embedded = side.embed(side.tokens[:, 0]).detach()
    want, step = noise(3, 32).double(), 1e-8
    gradient = side.gradient(side.tokens, torch.tensor([0, 1, 2]), lambda classes: want)
    up, down = (side.encode(side.tokens[:, 0], embedded + sign * step * gradient) for sign in (1, -1))
    expected = float(((up - down) * want).sum()) / (2 * step)
    assert float(gradient.square().sum()) == pytest.approx(expected, rel=1e-5)


def test_prompt_tuning_at_test_time_begins_at_the_learned_context(folders: dict[str, Path]) -> None:
    model = with_context(loaded(folders), 4, 32)
    classifier = model.zero_shot(CLASSES, TEMPLATES)
    tower = PromptTower(classifier.text_side)  # type: ignore[arg-type]
    assert torch.equal(tower.context[0], noise(4, 32))
    assert torch.allclose(tower(tower.context.expand(1, -1, -1, -1))[0], classifier.text_features, atol=1e-5)


def test_a_context_of_each_class_is_no_prompt_for_others_and_none_to_tune(folders: dict[str, Path]) -> None:
    model = with_context(loaded(folders), 3, 4, 32, class_names=CLASSES)
    classifier = model.zero_shot(CLASSES, TEMPLATES)
    with pytest.raises(UserError, match="learned one for each") as caught:
        _ = classifier.text_side
    assert is_one_sentence(caught.value)
    for names in (("dog", "ship"), CLASSES[::-1], ("",)):
        with pytest.raises(UserError, match="learned for each of 3 classes") as refused:
            model.text_features(names, TEMPLATES)
        assert is_one_sentence(refused.value)


# what does not fit


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("rn", {"visual": noise(1, 2, 64)}, "defined for a vision transformer, and this one is ModifiedResNet"),
        ("vit", {"visual": noise(3, 2, 64)}, "tokens for 3 blocks, the image tower has 2"),
        ("vit", {"visual": noise(1, 2, 32)}, "vectors of 32 entries, the model's image tower has 64"),
        ("vit", {"context": noise(2, 64), "template": places(2)}, "vectors of 64 entries, the model's text tower"),
        ("vit", {"context": noise(2, 32), "text": noise(2, 2, 32)}, "vectors for 3 blocks, the text tower has 2"),
    ],
)
def test_prompts_that_do_not_fit_are_refused_and_change_nothing(
    kind: str, options: dict[str, Any], message: str, folders: dict[str, Path], images: Tensor
) -> None:
    model = loaded(folders, kind)
    before, seen = model.weights_hash, model.clip.encode_image(images)
    with pytest.raises(UserError, match=message) as caught:
        model.add_prompts(LearnedPrompts(**options))
    assert is_one_sentence(caught.value)
    assert model.weights_hash == before
    assert torch.equal(model.clip.encode_image(images), seen)


def test_a_model_has_prompts_once(folders: dict[str, Path]) -> None:
    model = with_context(loaded(folders), 4, 32)
    with pytest.raises(UserError, match="the model has learned prompts already"):
        with_context(model, 4, 32)


def test_a_template_with_fewer_words_than_vectors_is_refused(folders: dict[str, Path]) -> None:
    model = loaded(folders)
    model.add_prompts(LearnedPrompts(template="the {c}", context=noise(4, 32)))
    with pytest.raises(UserError, match="1 tokens before the class name, fewer than the 4 vectors"):
        model.text_features(CLASSES, TEMPLATES)


def test_a_copy_reads_its_own_prompts(folders: dict[str, Path], images: Tensor) -> None:
    model = prompted(folders)
    other, before = deepcopy(model), model.clip.encode_image(images)
    with torch.no_grad():
        other.clip.prompts.visual.neg_()
    assert torch.equal(model.clip.encode_image(images), before)
    assert not torch.allclose(other.clip.encode_image(images), before, atol=1e-3)


def test_an_image_tower_with_learned_tokens_is_no_backbone(folders: dict[str, Path], tmp_path: Path) -> None:
    name = f"local-dir:{save_folder(prompted(folders), tmp_path / 'out', {})}"
    with pytest.raises(UserError, match="learned tokens inside of its image tower"):
        load_backbone(name)
    text_alone = save_folder(with_context(loaded(folders), 4, 32), tmp_path / "text", {})
    assert load_backbone(f"local-dir:{text_alone}").width == 32
