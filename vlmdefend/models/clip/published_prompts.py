"""Loads the learned prompts that authors publish into the model that they were learned on.

* TeCoA, PMG-AFT and their descendants (``visual_prompt.py``): a border of pixels, folded into the positional embedding;
  N more tokens behind the patches, before the first norm.
* APT, AdvPT and CoOp (Dassl): ``ctx``, the vectors before the class name.
* FAP and AdvMaPLe (Dassl): the whole model, with deep prompts of one tower as projections of the other's.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmdefend.errors import UserError
from vlmdefend.models.prompts.learned_prompts import LearnedPrompts, check_vision_transformer, places
from vlmdefend.models.weights.tensor_file import unwrapped
from vlmdefend.models.zero_shot.text_tower import token_embedding

if TYPE_CHECKING:
    from vlmdefend.models.clip.vision_language import VisionLanguageModel

TOWER = "vision_encoder_state_dict"
POSITIONS = "prompt_pos_embedding"  # of TeCoA's tokens; a parameter of its image tower
SIDES = ("pad_up", "pad_down", "pad_left", "pad_right")
# What FAP's code puts before the class name: the template as it stands, braces and full stop too, then "NAME."
WORDS = (
    "a photo of a",
    "a photo of a {}.",
    "a photo of {}, a type of food.",
    "a photo of a {}, a type of pet.",
    "a photo of a {}, a type of flower.",
    "a photo of a {}, a type of aircraft.",
    "a photo of a person doing {}.",
    "a centered satellite photo of {}.",
    "{} texture.",
)


def image_tower_of(contents: dict[str, Any]) -> dict[str, Tensor] | None:
    """Returns the fine-tuned image tower beside a published prompt, if there is one."""
    tower = contents.get(TOWER)
    if not isinstance(tower, dict) or not tower:
        return None
    return {name: tensor for name, tensor in unwrapped(dict(tower)).items() if name != POSITIONS}


def add_published_prompts(model: VisionLanguageModel, contents: dict[str, Any], source: Path) -> None:
    """Adds the prompts of a published file to ``model``.

    Raises:
        UserError: they do not fit, or are of a kind that the file does not show.
    """
    if "add_prompter" in contents:
        _add_visual(model, contents, source)
        return
    state = {name: tensor.float() for name, tensor in unwrapped(dict(contents.get("state_dict") or contents)).items()}
    learner = {name.removeprefix("prompt_learner."): t for name, t in state.items() if name.startswith("prompt_")}
    if learner:
        _check_backbone(model, state, source)
        model.add_prompts(_deep(model, learner, source), str(source))
    else:
        model.add_prompts(_context(state["ctx"], source), str(source))


def _add_visual(model: VisionLanguageModel, contents: dict[str, Any], source: Path) -> None:
    border = unwrapped(dict(contents.get("state_dict") or {}))
    added = unwrapped(dict(contents.get("add_prompter") or {}))
    if (border and set(border) != set(SIDES)) or (added and set(added) != {"prompt"}):
        names = ", ".join([*border, *added])
        raise UserError(
            f"{source}: holds a visual prompt of another kind ({names}); known are a border ({', '.join(SIDES)}) and "
            "tokens (prompt)."
        )
    if border:
        _fold_border(model, border, source)
    if added and added["prompt"].shape[1]:
        tokens = added["prompt"].float()  # (1, N, V)
        positions = unwrapped(dict(contents.get(TOWER) or {})).get(POSITIONS)
        model.add_prompts(LearnedPrompts(visual=tokens if positions is None else tokens + positions), str(source))


@torch.no_grad()
def _fold_border(model: VisionLanguageModel, border: dict[str, Tensor], source: Path) -> None:
    """Folds a visual prompt (a border) into the patch embedding: the border adds a constant to each patch."""
    check_vision_transformer(model.clip, 1, str(source))
    up, down, left, right = (border[side].float() for side in SIDES)
    side = model.image_size
    if up.shape[-1] != side or up.shape[-2] + down.shape[-2] + left.shape[-2] != side:
        raise UserError(f"{source}: its border is for images of {up.shape[-1]} pixels, the model takes {side}.")
    middle = torch.zeros(1, 3, left.shape[-2], side - left.shape[-1] - right.shape[-1])
    image = torch.cat([up, torch.cat([left, middle, right], dim=3), down], dim=2).to(model.device)
    tower = model.clip.visual
    weight = tower.conv1.weight
    patches = F.conv2d(image, weight, stride=weight.shape[-2:]).flatten(2)[0].T  # (P, V)
    tower.positional_embedding[1:] += patches


def _context(context: Tensor, source: Path) -> LearnedPrompts:
    if context.dim() == 3:
        raise UserError(
            f"{source}: holds contexts of each of {len(context)} classes and does not say which classes these are; "
            "learn them anew with `vlmdefend train --method apt --trains class-context:M`."
        )
    return LearnedPrompts(template=places(len(context)), context=context)


def _deep(model: VisionLanguageModel, learner: dict[str, Tensor], source: Path) -> LearnedPrompts:
    """Reads deep tokens: FAP projects visual tokens to the text tower, AdvMaPLe text tokens to the image tower."""
    context = learner["ctx"]
    project = _linear(learner, "proj")
    from_image = any(name.startswith("compound_prompts_image.") for name in learner)
    kind = "image" if from_image else "text"
    count = sum(name.startswith(f"compound_prompts_{kind}.") for name in learner)
    given = [learner[f"compound_prompts_{kind}.{number}"] for number in range(count)]
    made = [_linear(learner, f"compound_prompt_projections.{n}")(tokens) for n, tokens in enumerate(given)]
    visual, text = (given, made) if from_image else (made, given)
    return LearnedPrompts(
        template=_template(model, learner["token_suffix"][0], len(context), source),
        context=context,
        visual=torch.stack([project(context), *visual]),
        text=torch.stack(text) if text else None,
    )


def _linear(learner: dict[str, Tensor], name: str) -> Callable[[Tensor], Tensor]:
    weight, bias = learner[f"{name}.weight"], learner[f"{name}.bias"]
    return lambda tokens: F.linear(tokens, weight, bias)


def _template(model: VisionLanguageModel, suffix: Tensor, length: int, source: Path) -> str:
    """Returns the words that follow the context, found by their embeddings (L, W) in the file."""
    tokenizer: Any = model.tokenizer
    table = token_embedding(model.clip).weight.detach().cpu()
    for words in sorted(WORDS, key=lambda text: -len(tokenizer.encode(text))):
        rest = table[tokenizer.encode(words)[length:]]
        if torch.allclose(rest, suffix[: len(rest)], atol=1e-3, rtol=1e-2):
            return f"{words} {{c}}."
    raise UserError(f"{source}: the words after its context are none of the published templates, or of another model.")


def _check_backbone(model: VisionLanguageModel, state: dict[str, Tensor], source: Path) -> None:
    given, own = state.get("image_encoder.conv1.weight"), model.clip.visual.state_dict().get("conv1.weight")
    if given is None:
        return
    if own is None or own.shape != given.shape or not torch.allclose(own.cpu(), given, atol=1e-3, rtol=1e-2):
        raise UserError(f"{source}: its prompts were learned on other weights than {model.name}'s; name that model.")
