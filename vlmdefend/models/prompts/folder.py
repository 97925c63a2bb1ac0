"""Learned prompts in a model folder: ``learned_prompts.safetensors``, and a key of ``model_cfg`` that announces it.

The weights beside them are the plain backbone's. Plain open_clip would drop the prompts, and another model would be
measured. It cannot: it hands ``model_cfg`` to the constructor of CLIP, which stops at the word ``learned_prompts``
(``unexpected keyword argument``). Who wants the backbone alone deletes the key.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from vlmdefend.errors import UserError
from vlmdefend.models.prompts.learned_prompts import PROMPTS_KEY, LearnedPrompts
from vlmdefend.models.weights.checkpoint import PROMPTS, read_weights

PARTS = ("context", "visual", "text")


def write_prompts(prompts: LearnedPrompts, folder: Path) -> None:
    """Writes the vectors as the towers read them."""
    state = prompts.deployed().state_dict()
    save_file({name: tensor.cpu().contiguous() for name, tensor in state.items()}, folder / PROMPTS, {"format": "pt"})


def read_prompts(config: Any, file: Path) -> LearnedPrompts:
    """Reads what :func:`write_prompts` wrote, with its description in ``model_cfg``.

    Raises:
        UserError: no such file, damaged, or not what the configuration describes.
    """
    if not isinstance(config, dict) or not isinstance(config.get("template"), str):
        raise UserError(f"{file}: {PROMPTS_KEY} in the model's configuration names no template; write the model again.")
    state = read_weights(file)
    if not state or set(state) - set(PARTS):
        raise UserError(f"{file}: holds {', '.join(state) or 'nothing'}, not learned prompts; write the model again.")
    return LearnedPrompts(template=config["template"], class_names=config.get("class_names"), **state)
