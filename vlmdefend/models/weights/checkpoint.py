"""Reads weight files and the configuration of open_clip model folders; no code in a file is ever run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from vlmdefend.errors import UserError
from vlmdefend.models.weights.tensor_file import named_prompts, plain_names, read_contents

CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"
METADATA = "vlmdefend.json"
PROMPTS = "learned_prompts.safetensors"
WEIGHTS_NAMES = (  # open_clip's own order of preference, and the compressed form of the embedded models
    WEIGHTS,
    WEIGHTS + ".xz",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Returns the tensors of a ``.safetensors`` (also ``.xz``), ``.pt``, ``.pth`` or ``.bin`` file, on the CPU, by
    name.

    Dictionaries nested as ``vision_encoder_state_dict``, ``state_dict`` or ``model`` are opened, wrappers'
    prefixes (``module.``) dropped. Pickles are read with ``weights_only=True``: nothing in a file is run.

    Raises:
        UserError: no such file, cut short, not weights (a web page, a git-lfs pointer), or a pickle of more than
            tensors; a published file with a prompt, without which another model would be measured.
    """
    file = Path(path).expanduser()
    check_weights_file(file)
    contents = read_contents(file)
    if prompt := named_prompts(contents):
        raise UserError(f"{file} holds a learned prompt ({prompt} ...); give it as --weights of the model it is for.")
    return plain_names(contents, file)


def find_weights(folder: Path) -> Path:
    """Returns the weights file of a model folder.

    Raises:
        UserError: there is none.
    """
    for name in WEIGHTS_NAMES:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder} has no weights: {WEIGHTS} is missing; copy it there or write the model again.")


def read_config(file: Path) -> dict[str, Any]:
    """Reads ``open_clip_config.json``: a dictionary with at least ``model_cfg``.

    Raises:
        UserError: missing, not JSON, or without ``model_cfg``.
    """
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file} is missing; a model folder needs open_clip's {CONFIG} beside {WEIGHTS}.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not readable JSON ({error}); copy or write the model again.") from None
    parts = config.get("model_cfg") if isinstance(config, dict) else None
    if not isinstance(parts, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= set(parts):
        raise UserError(f"{file} does not describe a model: model_cfg must hold embed_dim, vision_cfg and text_cfg.")
    return {"model_cfg": parts, "preprocess_cfg": config.get("preprocess_cfg") or {}}


def check_weights_file(file: Path) -> None:
    """Checks the first bytes of a file.

    Raises:
        UserError: no such file, a folder, empty, a git-lfs pointer or a web page.
    """
    if file.is_dir():
        raise UserError(f"{file} is a folder; give a weights file, or the folder as the model local-dir:{file}.")
    if not file.is_file():
        raise UserError(f"{file}: no such file; give a .safetensors, .pt or .pth file.")
    try:
        with file.open("rb") as opened:
            head = opened.read(512)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); check its permissions.") from None
    if not head:
        raise UserError(f"{file} is empty; download or write it again.")
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"{file} is a git-lfs pointer, not the weights; run `git lfs pull` in its repository.")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise UserError(f"{file} is a web page, not weights; download the file itself (its raw or resolved address).")
