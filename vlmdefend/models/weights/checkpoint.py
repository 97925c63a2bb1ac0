"""Model files: weights read without ever running what is in them, and open_clip's folder format written whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor

from vlmdefend.errors import UserError
from vlmdefend.models.weights.tensor_file import named_prompts, plain_names, read_contents

if TYPE_CHECKING:
    from vlmdefend.models.clip.vision_language import VisionLanguageModel

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
    """The tensors of a ``.safetensors`` (also ``.xz``), ``.pt``, ``.pth`` or ``.bin`` file, on the CPU, by name.

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
    """The weights file of a model folder.

    Raises:
        UserError: there is none.
    """
    for name in WEIGHTS_NAMES:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder} has no weights: {WEIGHTS} is missing; copy it there or write the model again.")


def read_config(file: Path) -> dict[str, Any]:
    """``open_clip_config.json``: a dictionary with at least ``model_cfg``.

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


def save_folder(
    model: VisionLanguageModel, folder: str | Path, metadata: dict[str, Any], *, beside: Collection[str] = ()
) -> Path:
    """Write ``model`` in open_clip's folder format; ``local-dir:FOLDER`` reads it, here and in plain open_clip.

    The metadata (base model, how it was made; the package version and the weights' hash are added) goes into the
    safetensors header and into ``vlmdefend.json``. A new folder appears whole or not at all. A model that is
    already there is replaced; other files beside it stay; if killed in between, the folder holds the old weights,
    the new ones, or none, never a part.

    Args:
        beside: names of files and folders that may be in the folder although no model is.

    Returns:
        The folder.

    Raises:
        UserError: the folder holds something that is not a model, or cannot be written.
    """
    target = Path(folder).expanduser().resolve()
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file; give a folder to write the model to.")
    others = {entry.name for entry in target.iterdir()} - set(beside) if target.is_dir() else set()
    if others and not (target / CONFIG).is_file():
        raise UserError(f"{target} is not empty and holds no model; give a new folder, so that nothing is lost.")
    facts = {"vlmdefend": _version(), "base_model": model.name, **metadata, "weights_hash": model.weights_hash}
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        _write_model(model, partial, facts)
        _move_into_place(partial, target)
    except OSError as error:
        raise UserError(f"{target} cannot be written ({error.strerror or error}); give another folder.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def check_weights_file(file: Path) -> None:
    """Look at the first bytes of a file.

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


def _write_model(model: VisionLanguageModel, folder: Path, facts: dict[str, Any]) -> None:
    from vlmdefend.models.prompts.folder import write_prompts

    preprocess = {k: model.preprocess_cfg[k] for k in ("mean", "std", "interpolation", "resize_mode")}
    config = {"model_cfg": model.model_cfg, "preprocess_cfg": preprocess}
    state = {name: tensor for name, tensor in model.clip.state_dict().items() if not name.startswith("prompts.")}
    if model.prompts is not None:
        write_prompts(model.prompts, folder)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / METADATA).write_text(json.dumps(facts, indent=2, default=str) + "\n", encoding="utf-8")
    header = {k: v if isinstance(v, str) else json.dumps(v, default=str) for k, v in facts.items()}
    save_file(_separate(state), folder / WEIGHTS, metadata={"format": "pt", **header})
    shutil.copymode(folder / CONFIG, folder / WEIGHTS)  # safetensors writes for the owner alone
    if model.model_cfg["text_cfg"].get("hf_tokenizer_name") and hasattr(model.tokenizer, "save_pretrained"):
        model.tokenizer.save_pretrained(str(folder))  # plain open_clip looks for it in the folder


def _separate(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU, none sharing memory: what the format can hold."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in state.items():
        own = tensor.detach().cpu().contiguous()
        storage = own.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != own.nbytes:
            own = own.clone()
        seen.add(own.untyped_storage().data_ptr())
        separate[name] = own
    return separate


def _move_into_place(partial: Path, target: Path) -> None:
    if not target.is_dir() or not any(target.iterdir()):
        partial.replace(target)
        return
    old = (target / CONFIG).read_bytes() if (target / CONFIG).is_file() else None
    if old != (partial / CONFIG).read_bytes():
        for name in WEIGHTS_NAMES:  # another architecture: never its configuration beside the old weights
            (target / name).unlink(missing_ok=True)
    if (partial / PROMPTS).is_file() or (target / PROMPTS).is_file():  # never prompts beside others' weights
        for name in (*WEIGHTS_NAMES, PROMPTS):
            (target / name).unlink(missing_ok=True)
    last = {WEIGHTS: 1, METADATA: 2}
    for file in sorted(partial.iterdir(), key=lambda f: last.get(f.name, 0)):
        file.replace(target / file.name)


def _version() -> str:
    try:
        return version("vlmdefend")
    except PackageNotFoundError:
        return "unknown"
