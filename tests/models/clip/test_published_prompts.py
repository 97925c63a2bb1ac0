"""The prompts that authors publish, made here with the same keys and layout, become part of the model they are for."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.conftest import is_one_sentence
from tests.models.prompts.test_learned_prompts import image_by_hand
from tests.models.weights.test_paper_checkpoints import momentum
from vlmdefend.errors import UserError
from vlmdefend.models import load_model
from vlmdefend.models.clip.vision_language import VisionLanguageModel
from vlmdefend.models.weights.checkpoint import read_weights
from vlmdefend.models.zero_shot.text_tower import encode_embedded

CLASSES = ("cat", "ankle boot", "t-shirt")
TEMPLATES = ("a photo of a {c}.",)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def plain(folders: dict[str, Path], kind: str = "vit") -> VisionLanguageModel:
    return load_model(f"local-dir:{folders[kind]}", device="cpu")


def read(folders: dict[str, Path], contents: dict[str, Any], file: Path, kind: str = "vit") -> VisionLanguageModel:
    torch.save(contents, file)
    return load_model(f"local-dir:{folders[kind]}", weights=file, device="cpu")


# TeCoA's visual prompts


def border(width: int, side: int = 32) -> dict[str, Tensor]:
    inner = side - 2 * width
    return {
        "module.pad_up": noise(1, 3, width, side),
        "module.pad_down": noise(1, 3, width, side),
        "module.pad_left": noise(1, 3, inner, width),
        "module.pad_right": noise(1, 3, inner, width),
    }


def with_border(images: Tensor, pads: dict[str, Tensor], width: int) -> Tensor:
    prompted = images.clone()
    prompted[..., :width, :] += pads["module.pad_up"]
    prompted[..., -width:, :] += pads["module.pad_down"]
    prompted[..., width:-width, :width] += pads["module.pad_left"]
    prompted[..., width:-width, -width:] += pads["module.pad_right"]
    return prompted


def visual_prompt(pads: dict[str, Tensor], tokens: int, **more: Any) -> dict[str, Any]:
    """What ``visual_prompt.py`` saves: both prompters within DataParallel."""
    return {
        "epoch": 10,
        "state_dict": OrderedDict(pads),
        "add_prompter": OrderedDict({"module.prompt": noise(1, tokens, 64)}),
        "best_acc1": torch.tensor(32.0),
        "optimizer": momentum(pads),
        **more,
    }


def test_a_border_and_tokens_behind_the_patches_are_loaded(
    folders: dict[str, Path], tmp_path: Path, images: Tensor
) -> None:
    pads, vanilla = border(6), plain(folders)
    contents = visual_prompt(pads, 5)
    found = read(folders, contents, tmp_path / "model_best.pth.tar")
    tokens = contents["add_prompter"]["module.prompt"]
    expected = image_by_hand(vanilla, with_border(images, pads, 6), tokens)
    assert torch.allclose(found.clip.encode_image(images), expected, atol=1e-4)
    assert torch.equal(found.text_features(CLASSES, TEMPLATES), vanilla.text_features(CLASSES, TEMPLATES))


def test_a_border_alone_is_folded_into_the_weights(folders: dict[str, Path], tmp_path: Path, images: Tensor) -> None:
    pads, vanilla = border(4), plain(folders)
    contents = visual_prompt(pads, 0)
    found = read(folders, contents, tmp_path / "model_best.pth.tar")
    expected = vanilla.clip.encode_image(with_border(images, pads, 4))
    assert torch.allclose(found.clip.encode_image(images), expected, atol=1e-4)
    assert found.prompts is None


def test_tokens_with_positions_of_their_own_beside_a_fine_tuned_tower(
    folders: dict[str, Path], tmp_path: Path, images: Tensor
) -> None:
    tuned = plain(folders)
    with torch.no_grad():
        tuned.clip.visual.proj.add_(0.1)
    positions = noise(5, 64)
    tower = {**tuned.clip.visual.state_dict(), "prompt_pos_embedding": positions}
    contents = visual_prompt({}, 5, vision_encoder_state_dict=tower)
    found = read(folders, contents, tmp_path / "model_best.pth.tar")
    expected = image_by_hand(tuned, images, contents["add_prompter"]["module.prompt"] + positions)
    assert torch.allclose(found.clip.encode_image(images), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "contents", "message"),
    [
        ("vit", visual_prompt({"module.patch": noise(1, 3, 4, 4)}, 0), "a visual prompt of another kind"),
        ("vit", visual_prompt(border(6, side=40), 0), "border is for images of 40 pixels, the model takes 32"),
        ("rn", visual_prompt(border(6), 0), "defined for a vision transformer"),
        ("rn", visual_prompt({}, 3), "defined for a vision transformer"),
    ],
)
def test_a_visual_prompt_that_has_no_place_is_refused_and_not_dropped(
    kind: str, contents: dict[str, Any], message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read(folders, contents, tmp_path / "prompted.pth.tar", kind)
    assert is_one_sentence(caught.value)


def test_weights_that_are_read_without_a_model_to_put_the_prompt_into_are_refused(tmp_path: Path) -> None:
    torch.save(visual_prompt(border(6), 5), tmp_path / "prompted.pth.tar")
    with pytest.raises(UserError, match="holds a learned prompt"):
        read_weights(tmp_path / "prompted.pth.tar")


# prompt learners of Dassl's trainers


def dassl(state: dict[str, Tensor]) -> dict[str, Any]:
    """What Dassl's ``save_model`` writes after a warm-up: its scheduler's state holds objects of torch's."""
    optimizer = torch.optim.SGD([nn.Parameter(noise(2))], lr=2e-3, momentum=0.9, weight_decay=5e-4)
    successor = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
    scheduler = {"successor": successor, "warmup_epoch": 1, "cons_lr": 1e-5, "base_lrs": [2e-3], "last_epoch": 1}
    return {
        "state_dict": OrderedDict(state),
        "epoch": 50,
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler,
        "val_result": None,
    }


def learner(model: VisionLanguageModel, words: str, context: Tensor) -> dict[str, Tensor]:
    """CoOp's prompt learner: beside the context, the embeddings of what is before and behind it."""
    tokens = model.tokenizer([f"{words} {name}." for name in CLASSES])
    embedded = model.clip.token_embedding(tokens)
    length = context.shape[-2]
    return {"ctx": context, "token_prefix": embedded[:, :1], "token_suffix": embedded[:, 1 + length :]}


def by_hand(model: VisionLanguageModel, words: str, context: Tensor) -> Tensor:
    tokens = model.tokenizer([f"{words} {name}." for name in CLASSES])
    embedded = model.clip.token_embedding(tokens)
    embedded[:, 1 : 1 + len(context)] = context
    return encode_embedded(model.clip, tokens, embedded)


@pytest.mark.parametrize("kind", ["vit", "rn"])
@pytest.mark.parametrize("half", [False, True])
def test_the_context_of_apt_or_advpt_takes_the_place_of_the_templates(
    half: bool, kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    vanilla, context = plain(folders, kind), noise(6, 32).half().float()
    contents = dassl(learner(vanilla, "X X X X X X", context))
    if half:
        contents["state_dict"] = {name: tensor.half() for name, tensor in contents["state_dict"].items()}
    found = read(folders, contents, tmp_path / "model.pth.tar-50", kind)
    assert torch.equal(found.context, context)  # type: ignore[arg-type]
    expected = by_hand(vanilla, "X X X X X X", context)
    assert torch.allclose(found.text_features(CLASSES, TEMPLATES), expected, atol=1e-5)
    others = found.text_features(("dog", "ship"), TEMPLATES)  # other classes than it was learned on
    assert others.shape == (2, 32)


def test_contexts_of_classes_that_the_file_does_not_name_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    contents = dassl(learner(plain(folders), "X X X X", noise(3, 4, 32)))
    with pytest.raises(UserError, match="contexts of each of 3 classes and does not say which") as caught:
        read(folders, contents, tmp_path / "model.pth.tar-50")
    assert is_one_sentence(caught.value)


def whole(model: VisionLanguageModel, words: str, direction: str) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    """FAP's (``image``) or AdvMaPLe's (``text``) whole model, in half precision; context, visual and text tokens."""
    narrow, wide = (32, 64) if direction == "text" else (64, 32)
    first, maps = nn.Linear(32, 64), nn.Linear(narrow, wide)
    context, deep = noise(2, 32).half(), noise(2, narrow).half()
    state = {f"prompt_learner.{name}": tensor for name, tensor in learner(model, words, context.float()).items()}
    state |= {f"prompt_learner.proj.{name}": tensor for name, tensor in first.state_dict().items()}
    state[f"prompt_learner.compound_prompts_{direction}.0"] = deep
    state |= {f"prompt_learner.compound_prompt_projections.0.{n}": t for n, t in maps.state_dict().items()}
    state |= {f"image_encoder.{name}": tensor for name, tensor in model.clip.visual.state_dict().items()}
    state = {name: tensor.half() for name, tensor in state.items()}
    with torch.no_grad():
        (first, maps) = (layer.half().float() for layer in (first, maps))
        start, mapped = first(context.float()), maps(deep.float())
    visual, text = (deep.float(), mapped) if direction == "image" else (mapped, deep.float())
    return state, context.float(), torch.stack([start, visual]), text[None]


@pytest.mark.parametrize("direction", ["image", "text"])
@pytest.mark.parametrize("words", ["a photo of a", "a photo of a {}."])
def test_deep_prompts_of_fap_and_of_advmaple_are_read_through_their_projections(
    words: str, direction: str, folders: dict[str, Path], tmp_path: Path, images: Tensor
) -> None:
    vanilla = plain(folders)
    state, context, visual, text = whole(vanilla, words, direction)
    found = read(folders, dassl(state), tmp_path / "model.pth.tar-10")
    prompts = found.prompts
    assert prompts is not None
    assert prompts.template == f"{words} {{c}}."
    assert torch.allclose(prompts.text, text, atol=1e-5)  # type: ignore[arg-type]
    assert torch.equal(prompts.context, context)  # type: ignore[arg-type]
    assert torch.allclose(found.clip.encode_image(images), image_by_hand(vanilla, images, visual), atol=1e-4)
    assert F.cosine_similarity(found.text_features(CLASSES, TEMPLATES), by_hand(vanilla, words, context)).min() < 0.9999


def test_deep_prompts_learned_on_other_weights_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    state, *_ = whole(plain(folders), "a photo of a", "image")
    state["image_encoder.conv1.weight"] = state["image_encoder.conv1.weight"] + 0.1
    with pytest.raises(UserError, match="prompts were learned on other weights") as caught:
        read(folders, dassl(state), tmp_path / "model.pth.tar-10")
    assert is_one_sentence(caught.value)


class Other:
    """Stands for an object of a package that is not torch's."""


def test_a_scheduler_of_another_kind_is_not_unpickled(folders: dict[str, Path], tmp_path: Path) -> None:
    contents = dassl(learner(plain(folders), "X X X X", noise(4, 32)))
    contents["scheduler"]["successor"] = Other()
    with pytest.raises(UserError, match="not a file of tensors alone"):
        read(folders, contents, tmp_path / "model.pth.tar-50")
