"""Loads timm's image networks: by name, with a weights file, or from a folder that timm wrote."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from vlmdefend.errors import UserError, did_you_mean
from vlmdefend.models.weights.checkpoint import read_weights
from vlmdefend.models.weights.loading import load_exactly

LOCAL = "local-dir:"
CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")
NOT_THE_NETWORKS = frozenset(  # what timm's factory keeps for itself, paths to read among them
    ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "num_classes", "name")
)


@dataclass(frozen=True)
class TimmNetwork:
    """A network of timm in evaluation mode, with its preprocessing."""

    network: Any  # (B, 3, S, S) normalised -> (B, width), or (B, C) with its head
    width: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Literal["bicubic", "bilinear"]
    config: dict[str, Any]  # JSON: what builds it again, without its head
    class_names: tuple[str, ...]  # of the logits; empty: nobody wrote them down


def load_timm(name: str, *, pretrained: bool, head: bool = False) -> TimmNetwork:
    """Returns the network called ``name``, on the CPU; random weights come from the global random state.

    Args:
        name: as timm lists it; ``NAME@FILE`` with the weights of a file; or ``local-dir:FOLDER``, a snapshot of the
            hub or what ``timm.models.save_for_hf`` writes. Files are read without running anything in them.
        pretrained: with its weights.
        head: with its own classifier instead of without one.

    Raises:
        UnknownName: with the nearest names.
        UserError: weights that cannot be had, or that do not fit.
    """
    if name.startswith(LOCAL):
        return _from_folder(name, Path(name.removeprefix(LOCAL)).expanduser(), pretrained=pretrained, head=head)
    architecture, at, file = name.partition("@")
    _check_known(architecture)
    if at:
        return _from_file(architecture, Path(file).expanduser(), pretrained=pretrained, head=head)
    classes: dict[str, Any] = {} if head else {"num_classes": 0}
    network = _created(architecture, pretrained=pretrained, **classes)
    return _described(network, {"kind": "timm", "name": architecture})


def rebuild_timm(config: dict[str, Any]) -> nn.Module:
    """Builds the network of a saved configuration, without head; its weights are loaded afterwards."""
    _check_known(str(config["name"]))
    network: nn.Module = _created(str(config["name"]), **_own(config.get("arguments", {})), num_classes=0)
    return network


def _from_folder(name: str, folder: Path, *, pretrained: bool, head: bool) -> TimmNetwork:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        architecture, preprocess = str(config["architecture"]), dict(config.get("pretrained_cfg", config))
        classes, arguments = int(config["num_classes"]), _own(config.get("model_args", {}))
    except OSError:
        raise UserError(f"timm:{name}: {folder / CONFIG} cannot be read; give a folder as timm writes it.") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"timm:{name}: {folder / CONFIG} is no configuration of timm's; fetch it again.") from None
    _check_known(architecture)
    network = _created(architecture, **arguments, num_classes=classes, pretrained_cfg=_preprocessing(preprocess))
    if pretrained:
        file = next((folder / weights for weights in WEIGHTS if (folder / weights).is_file()), folder / WEIGHTS[0])
        load_exactly(network, read_weights(file), file)
    if not head:
        network.reset_classifier(0)
    written = config.get("label_names") or preprocess.get("label_names") or ()
    names = tuple(map(str, written)) if isinstance(written, list | tuple) and len(written) == classes else ()
    return _described(network, {"kind": "timm", "name": architecture, "arguments": arguments}, names)


def _from_file(architecture: str, file: Path, *, pretrained: bool, head: bool) -> TimmNetwork:
    state = read_weights(file)
    network = _created(architecture, num_classes=_classes(architecture, state))
    if pretrained:
        load_exactly(network, state, file)
    if not head:
        network.reset_classifier(0)
    return _described(network, {"kind": "timm", "name": architecture})


def _classes(architecture: str, state: dict[str, Tensor]) -> int:
    """Returns the number of rows of the head in a weights file; timm's own number where there is no head."""
    from timm.models import get_pretrained_cfg

    described = get_pretrained_cfg(architecture)
    head = None if described is None else described.classifier
    rows = state.get(f"{head}.weight")
    return 1000 if rows is None else len(rows)


def _created(architecture: str, **options: Any) -> Any:
    import timm

    try:
        return timm.create_model(architecture, **options).eval()
    except (RuntimeError, OSError, ValueError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        if not options.get("pretrained"):
            raise UserError(f"timm:{architecture}: cannot be built ({reason}).") from None
        raise UserError(
            f'timm:{architecture}: its weights cannot be had ({reason}); run `python -c "import timm; '
            f"timm.create_model('{architecture}', pretrained=True)\"` where there is a network, or give a file or a "
            f"folder of weights (timm:{architecture}@FILE, timm:local-dir:FOLDER), or tiny-cnn."
        ) from None


def _check_known(architecture: str) -> None:
    import timm

    if not timm.is_model(architecture.partition(".")[0]):
        raise did_you_mean("timm model", architecture, timm.list_models())


def _own(arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns the written arguments that shape the network."""
    return {name: value for name, value in arguments.items() if name not in NOT_THE_NETWORKS}


def _preprocessing(written: dict[str, Any]) -> dict[str, Any]:
    """Returns the part of a configuration that describes preprocessing and layer names."""
    names = ("input_size", "fixed_input_size", "interpolation", "mean", "std", "first_conv", "classifier")
    return {name: written[name] for name in names if name in written}


def _described(network: Any, config: dict[str, Any], class_names: tuple[str, ...] = ()) -> TimmNetwork:
    given = network.pretrained_cfg
    built_for = config.get("arguments", {}).get("img_size") or given["input_size"]
    return TimmNetwork(
        network,
        int(network.num_features),
        built_for if isinstance(built_for, int) else int(built_for[-1]),
        tuple(given["mean"]),
        tuple(given["std"]),
        "bilinear" if given.get("interpolation") == "bilinear" else "bicubic",
        config,
        class_names,
    )
