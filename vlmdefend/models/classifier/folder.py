"""Reads and writes a classifier with a head as a folder: configuration as JSON, weights as safetensors."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vlmdefend.errors import UserError
from vlmdefend.models.weights.checkpoint import METADATA, read_weights
from vlmdefend.models.weights.loading import load_exactly

CLASSIFIER_CONFIG = "vlmdefend_classifier.json"
CLASSIFIER_WEIGHTS = "model.safetensors"
FORMAT = 1
KEYS = ("backbone", "bottleneck", "bottleneck_kind", "head", "class_names", "preprocess")


def is_classifier_folder(folder: Path) -> bool:
    """Returns whether the folder holds a classifier with a head."""
    return (folder / CLASSIFIER_CONFIG).is_file()


def save_classifier(model: Any, folder: str | Path, metadata: dict[str, Any]) -> Path:
    """Writes a classifier with a head; ``local-dir:FOLDER`` reads it.

    The configuration comes last: a folder without it is no model yet. Other files in the folder stay.

    Raises:
        UserError: the folder cannot be written.
    """
    target = Path(folder).expanduser()
    config = {"format": FORMAT, **model.model_cfg, "preprocess": model.preprocess_cfg}
    facts = {**metadata, "weights_hash": model.weights_hash}
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in model.classifier.state_dict().items()}
    partial = target / f".{os.getpid()}.partial"
    try:
        partial.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial / CLASSIFIER_WEIGHTS, metadata={"format": "pt"})
        (partial / METADATA).write_text(json.dumps(facts, indent=2, default=str) + "\n", encoding="utf-8")
        (partial / CLASSIFIER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        shutil.copymode(partial / CLASSIFIER_CONFIG, partial / CLASSIFIER_WEIGHTS)
        for name in (CLASSIFIER_WEIGHTS, METADATA, CLASSIFIER_CONFIG):
            (partial / name).replace(target / name)
    except OSError as error:
        raise UserError(f"{target} cannot be written ({error.strerror or error}); give another folder.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def load_classifier(name: str, folder: Path, device: str | torch.device | None = None) -> Any:
    """Reads the classifier that :func:`save_classifier` wrote.

    Raises:
        UserError: a configuration or weights that are missing, damaged, or do not fit.
    """
    from vlmdefend.models.classifier.backbones import Backbone, rebuild
    from vlmdefend.models.classifier.classifier import ClassifierModel, ImageClassifier

    config = read_classifier_config(folder)
    wanted = config["preprocess"]
    state = read_weights(folder / CLASSIFIER_WEIGHTS)
    backbone = Backbone(
        rebuild(config["backbone"]),
        _inputs(config, state),
        int(wanted["size"]),
        tuple(wanted["mean"]),
        tuple(wanted["std"]),
        wanted["interpolation"],
        config["backbone"],
        True,
    )
    classifier = ImageClassifier(
        backbone,
        len(config["class_names"]),
        bottleneck=config["bottleneck"],
        bottleneck_kind=config["bottleneck_kind"],
        head=config["head"],
    )
    load_exactly(classifier, state, folder / CLASSIFIER_WEIGHTS)
    return ClassifierModel(
        name, classifier, config["class_names"], device or ("cuda" if torch.cuda.is_available() else "cpu")
    )


def read_classifier_config(folder: Path) -> dict[str, Any]:
    """Returns the checked configuration of a folder.

    Raises:
        UserError: not JSON, of a newer version, or with a key missing.
    """
    file = folder / CLASSIFIER_CONFIG
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        newer = int(config["format"]) > FORMAT
        missing = [k for k in KEYS if k not in config]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{file} is not readable JSON of a classifier; write the model again.") from None
    if newer:
        raise UserError(f"{file}: was written by a newer vlmdefend; upgrade vlmdefend to use it.")
    if missing:
        raise UserError(f"{file} lacks {missing[0]}; write the model again.")
    return config


def _inputs(config: dict[str, Any], state: dict[str, torch.Tensor]) -> int:
    """Returns the width of the backbone's features, read from the layer on top of it."""
    below = ("bottleneck.0.weight", "bottleneck.weight")
    names = below if config["bottleneck"] else ("head.weight", "head.0.weight")
    found = next((state[name] for name in names if name in state), None)
    if found is None or found.dim() != 2:
        raise UserError(f"the weights hold no {names[0]}; write the model again.")
    return int(found.shape[1])
