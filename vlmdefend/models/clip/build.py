"""Builds a CLIP model from its source: architecture, preprocessing, place of the weights."""

from __future__ import annotations

import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch

from vlmdefend.errors import UserError
from vlmdefend.models.clip.published_prompts import add_published_prompts, image_tower_of
from vlmdefend.models.clip.vision_language import VisionLanguageModel
from vlmdefend.models.prompts.folder import read_prompts
from vlmdefend.models.prompts.learned_prompts import PROMPTS_KEY
from vlmdefend.models.weights.checkpoint import (
    CONFIG,
    PROMPTS,
    WEIGHTS,
    check_weights_file,
    find_weights,
    read_config,
    read_weights,
)
from vlmdefend.models.weights.fetch import Repository
from vlmdefend.models.weights.loading import is_image_tower, load_image_tower, load_weights
from vlmdefend.models.weights.tensor_file import named_prompts, plain_names, read_contents


@dataclass(frozen=True)
class ModelSource:
    """The configuration of a model and where its weights and tokenizer are, before they are read."""

    name: str
    config: dict[str, Any]  # open_clip's model_cfg and preprocess_cfg
    weights: Callable[[], Path]  # finds or downloads the file
    tokenizer: Callable[[], Any]
    source: str  # what a message calls the configuration
    folder: Path | None = None  # where it lies, if on this machine
    prompts: Callable[[], Path] | None = None  # finds or downloads learned prompts, where the configuration has some


def tags(architecture: str) -> list[str]:
    """Returns the tags of weights that open_clip lists for an architecture."""
    return list(open_clip.list_pretrained_tags_by_model(architecture))


def from_folder(name: str, folder: Path) -> ModelSource:
    """Returns the source of a folder in open_clip's format.

    Raises:
        UserError: no such folder, or its configuration is missing or invalid.
    """
    if not folder.is_dir():
        raise UserError(f"{name}: there is no folder {folder}; give the path of a folder with {CONFIG} and {WEIGHTS}.")
    return ModelSource(
        name=name,
        config=read_config(folder / CONFIG),
        weights=lambda: find_weights(folder),
        tokenizer=lambda: open_clip.get_tokenizer(f"local-dir:{folder}"),
        source=str(folder / CONFIG),
        folder=folder,
        prompts=lambda: folder / PROMPTS,
    )


def from_hub(name: str, repo: str, cache_dir: str | Path | None) -> ModelSource:
    """Returns the source of a hub repository in open_clip's format.

    Raises:
        UserError: not of the form ORG/NAME, or its files cannot be had.
    """
    if repo.count("/") != 1 or not all(repo.split("/")):
        raise UserError(f"{name!r} is not a hub repository; write it as hf-hub:ORG/NAME.")
    repository = Repository(name, repo, _command(name, None, cache_dir))
    config_file = repository.file([CONFIG], cache_dir)
    config = read_config(config_file)
    own_tokenizer = config["model_cfg"]["text_cfg"].get("hf_tokenizer_name")
    tokenizer_name = name if own_tokenizer else f"local-dir:{config_file.parent}"
    return ModelSource(
        name=name,
        config=config,
        weights=lambda: repository.file([WEIGHTS, "open_clip_pytorch_model.bin"], cache_dir),
        tokenizer=lambda: open_clip.get_tokenizer(tokenizer_name, cache_dir=cache_dir),
        source=f"{CONFIG} of {name}",
        prompts=lambda: repository.file([PROMPTS], cache_dir),
    )


def from_open_clip(name: str, architecture: str, tag: str, cache_dir: str | Path | None) -> ModelSource:
    """Returns the source of an architecture of open_clip's, with activation, preprocessing and weights of ``tag``."""
    pretrained = open_clip.get_pretrained_cfg(architecture, tag) if tag else {}
    quick = f"{architecture}-quickgelu"
    if pretrained.get("quick_gelu") and open_clip.get_model_config(quick):
        architecture = quick
    model_cfg = open_clip.get_model_config(architecture)
    if pretrained.get("quick_gelu"):
        model_cfg["quick_gelu"] = True
    repo, _, file = pretrained.get("hf_hub", "").rpartition("/")
    repository = Repository(name, repo, _command(architecture, tag, cache_dir))
    names = [f"{Path(file).stem}.safetensors", file] if file else [WEIGHTS, "open_clip_pytorch_model.bin"]
    return ModelSource(
        name=name,
        config={"model_cfg": model_cfg, "preprocess_cfg": pretrained},
        weights=lambda: repository.file(names, cache_dir),
        tokenizer=lambda: open_clip.get_tokenizer(architecture, cache_dir=cache_dir),
        source=f"open_clip's {architecture}",
    )


def assemble(
    blueprint: ModelSource, *, weights: str | Path | None = None, device: str | torch.device | None = None
) -> VisionLanguageModel:
    """Builds the model and loads its weights, or those of the file ``weights``.

    The weights may be of the image tower alone, or a published file with prompts: the rest is then the named model's.

    Raises:
        UserError: the configuration cannot be built, the weights cannot be had or do not fit.
    """
    clip, model_cfg = untrained(blueprint.config, blueprint.source), dict(blueprint.config["model_cfg"])
    learned = model_cfg.pop(PROMPTS_KEY, None)
    if weights is not None and learned is not None:
        raise UserError(f"{blueprint.name} has prompts that were learned with its own weights; leave --weights out.")
    source = blueprint.weights() if weights is None else Path(weights).expanduser()
    published = None
    if weights is None:
        load_weights(clip, read_weights(source), source)
    else:
        published = _load(clip, blueprint, source)
    model = VisionLanguageModel(
        name=blueprint.name if weights is None else f"{blueprint.name}+{source.stem}",
        clip=clip,
        tokenizer=_tokenizer(blueprint),
        model_cfg=model_cfg,
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
    )
    if learned is not None and blueprint.prompts is not None:
        file = blueprint.prompts()
        model.add_prompts(read_prompts(learned, file), str(file))
    if published is not None:
        add_published_prompts(model, published, source)
    return model


def _load(clip: Any, blueprint: ModelSource, source: Path) -> dict[str, Any] | None:
    """Loads the weights of a user's file; returns the prompts in it, if there are any."""
    check_weights_file(source)
    contents = read_contents(source)
    prompted = named_prompts(contents) is not None
    tower = image_tower_of(contents) if prompted else None
    state = tower if prompted else plain_names(contents, source)
    if not prompted and state is not None and is_image_tower(clip, state):
        tower = state
    if prompted or tower is not None:
        base = _own_weights(blueprint, source, "a prompt" if tower is None else "an image tower alone")
        load_weights(clip, read_weights(base), base)
        if tower is not None:
            load_image_tower(clip, tower, source)
    elif state is not None:
        load_weights(clip, state, source)
    return contents if prompted else None


def _own_weights(blueprint: ModelSource, weights: Path, what: str) -> Path:
    """Loads the named model's own weights, for the parts that the file does not hold."""
    try:
        return blueprint.weights()
    except UserError as error:
        raise UserError(f"{weights} holds {what}, and {error}") from None


def untrained(config: dict[str, Any], source: str = "the saved configuration") -> Any:
    """Builds the architecture of ``model_cfg`` with random weights; the global random state is restored.

    Prompts that were learned on it are not part of it.

    Raises:
        UserError: the configuration, which ``source`` names, cannot be built.
    """
    plain = {name: value for name, value in config["model_cfg"].items() if name != PROMPTS_KEY}
    config = {**config, "model_cfg": plain}
    with tempfile.TemporaryDirectory() as folder, _quiet(), torch.random.fork_rng(devices=[]):
        (Path(folder) / CONFIG).write_text(json.dumps(config), encoding="utf-8")
        try:
            return open_clip.create_model(f"local-dir:{folder}", load_weights=False, pretrained_text=False)
        except Exception as error:  # whatever a wrong configuration makes open_clip's constructors raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise UserError(f"{source} cannot be built by open_clip ({reason}).") from error


_TOKENIZERS: dict[str, Any] = {}  # open_clip's own, by text configuration: building one takes a third of a second


def _tokenizer(blueprint: ModelSource) -> Any:
    text = blueprint.config.get("model_cfg", {}).get("text_cfg", {})
    key = "" if "hf_tokenizer_name" in text else json.dumps(text, sort_keys=True, default=str)
    if key not in _TOKENIZERS:
        found = _build_tokenizer(blueprint)
        if not key:
            return found
        _TOKENIZERS[key] = found
    return copy(_TOKENIZERS[key])


def _build_tokenizer(blueprint: ModelSource) -> Any:
    try:
        with _quiet():
            return blueprint.tokenizer()
    except ImportError as error:
        raise UserError(
            f"the tokenizer of {blueprint.name} needs another package: `pip install transformers`."
        ) from error
    except Exception as error:  # hub, files and formats of a tokenizer that is not open_clip's own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(f"the tokenizer of {blueprint.name} cannot be had ({reason}).") from error


def _command(model: str, tag: str | None, cache_dir: str | Path | None) -> str:
    """Returns the line of Python that downloads the weights with plain open_clip."""
    options = [repr(model)]
    options += [f"pretrained={tag!r}"] if tag else []
    options += [f"cache_dir={str(cache_dir)!r}"] if cache_dir else []
    return f"import open_clip; open_clip.create_model({', '.join(options)})"


@contextmanager
def _quiet() -> Iterator[None]:
    """Context in which open_clip's log messages on models without weights are suppressed."""
    root, disabled = logging.getLogger(), logging.root.manager.disable
    silent = logging.NullHandler()
    root.addHandler(silent)
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        root.removeHandler(silent)
