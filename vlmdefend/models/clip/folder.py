"""Writes a model as a folder in open_clip's own format, whole or not at all."""

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
from vlmdefend.models.prompts.folder import write_prompts
from vlmdefend.models.weights.checkpoint import CONFIG, METADATA, PROMPTS, WEIGHTS, WEIGHTS_NAMES

if TYPE_CHECKING:
    from vlmdefend.models.clip.vision_language import VisionLanguageModel


def save_folder(
    model: VisionLanguageModel, folder: str | Path, metadata: dict[str, Any], *, beside: Collection[str] = ()
) -> Path:
    """Writes ``model`` in open_clip's folder format; ``local-dir:FOLDER`` reads it, here and in plain open_clip.

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


def _write_model(model: VisionLanguageModel, folder: Path, facts: dict[str, Any]) -> None:
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
    """Returns contiguous tensors on the CPU that share no memory, as safetensors requires."""
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
