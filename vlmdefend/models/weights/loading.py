"""Copies tensors by name into a model, all of them or none."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from vlmdefend.errors import UserError

NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size")  # OpenAI's archives carry them as tensors


def load_weights(clip: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """Copies ``state`` into the whole model, all names and shapes matching; converts open_clip's older layouts.

    Raises:
        UserError: names the first weight that is missing, unknown, or of another shape.
    """
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed

    wanted = clip.state_dict()
    state = convert_state_dict(clip, {k: v for k, v in state.items() if k not in NOT_WEIGHTS})
    if "positional_embedding" in state and "positional_embedding" not in wanted:
        state = convert_to_custom_text_state_dict(state)
    for name in ("logit_scale", "logit_bias"):
        if name in state and name in wanted and state[name].numel() == 1:
            state[name] = state[name].reshape(wanted[name].shape)
    position_ids = "text.transformer.embeddings.position_ids"
    if position_ids not in wanted:
        state.pop(position_ids, None)
    if all("positional_embedding" in name for name in _faults(wanted, state)):
        resize_pos_embed(state, clip)
        resize_text_pos_embed(state, clip)
    load_exactly(clip, state, source)


def is_image_tower(clip: nn.Module, state: dict[str, Tensor]) -> bool:
    """Returns whether ``state`` holds the image tower alone, with or without the prefix ``visual.``."""
    prefixed = [name.startswith("visual.") for name in state]
    known = set(state) & set(_visual(clip).state_dict())
    return all(prefixed) or (not any(prefixed) and len(known) > len(state) / 2)


def load_image_tower(clip: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """Copies an image tower's ``state`` into ``clip.visual``, all names and shapes matching.

    Raises:
        UserError: as :func:`load_weights`.
    """
    load_exactly(_visual(clip), _image_tower(state), source)


def load_exactly(module: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """Copies ``state`` into any module, all names and shapes matching.

    Raises:
        UserError: names the first weight that is missing, unknown, or of another shape.
    """
    faults = list(_faults(module.state_dict(), state).values())
    if faults:
        more = f" and {len(faults) - 1} more like it" if len(faults) > 1 else ""
        raise UserError(f"{source} does not fit the model: {faults[0]}{more}; choose the architecture it was made for.")
    module.load_state_dict(state)


def _faults(wanted: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, str]:
    """Returns what is wrong with each name of ``state``: other shapes first, then missing, then unknown names."""
    shapes = {
        name: f"{name} is {tuple(state[name].shape)} where the model has {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in state and state[name].shape != tensor.shape
    }
    missing = {name: f"{name} is missing" for name in wanted if name not in state}
    return shapes | missing | {name: f"the model has no {name}" for name in state if name not in wanted}


def _visual(clip: nn.Module) -> nn.Module:
    visual = clip.visual
    assert isinstance(visual, nn.Module)
    return visual


def _image_tower(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix("visual."): v for k, v in state.items() if k not in NOT_WEIGHTS}
