"""The state of a training run in one file, written whole or not at all: tensors, and JSON in the header."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vlmdefend.errors import StorageError, UserError

FORMAT = 1


def save_state(file: Path, groups: Mapping[str, Mapping[str, Tensor]], facts: dict[str, Any]) -> None:
    """Writes tensors by group and name, and ``facts`` (JSON); flushed to the disk, then moved into place.

    Raises:
        StorageError: the disk is full or cannot be written.
    """
    tensors = {
        f"{group}/{name}": tensor.detach().cpu().contiguous()
        for group, named in groups.items()
        for name, tensor in named.items()
    }
    header = json.dumps({"format": FORMAT, "groups": list(groups), **facts}, allow_nan=False)
    write_whole(file, save({k: v.clone() for k, v in tensors.items()}, {"vlmdefend_training": header}))


def load_state(file: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Reads what :func:`save_state` wrote.

    Raises:
        UserError: not such a file, cut short, or of a newer vlmdefend.
    """
    try:
        with safe_open(file, "pt") as opened:
            facts = json.loads((opened.metadata() or {})["vlmdefend_training"])
            groups: dict[str, dict[str, Tensor]] = {group: {} for group in facts.pop("groups")}
            for key in opened.keys():  # noqa: SIM118 - not a mapping
                group, _, name = key.partition("/")
                groups[group][name] = opened.get_tensor(key)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise UserError(f"{file}: is no whole training state ({reason}); delete it to start over.") from None
    if facts.pop("format") > FORMAT:
        raise UserError(f"{file}: was written by a newer vlmdefend; upgrade vlmdefend to go on with it.")
    return groups, facts


def write_whole(file: Path, content: bytes) -> None:
    """Writes a whole file or none.

    Raises:
        StorageError: the disk is full or cannot be written.
    """
    temporary = file.with_name(f".{file.name}.part")
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StorageError(
            f"{file}: cannot be written ({error.strerror or error}); what was saved before is kept. Free some space "
            "and run the same command again, or give another --out."
        ) from None


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """Returns the optimizer's state (momentum ...) as ``key|parameter name`` -> tensor."""
    state = optimizer.state_dict()["state"]
    return {
        f"{key}|{names[number]}": value
        for number, values in state.items()
        for key, value in values.items()
        if isinstance(value, Tensor)
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, names: list[str], tensors: Mapping[str, Tensor]) -> None:
    """Restores an optimizer from what :func:`optimizer_tensors` returned."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition("|")
        state.setdefault(names.index(name), {})[kind] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
