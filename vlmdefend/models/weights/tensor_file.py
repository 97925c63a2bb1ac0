"""Reads files of tensors without ever running code in them."""

from __future__ import annotations

import lzma
import pickle
import warnings
import zipfile
from collections import defaultdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import load_file
from torch import Tensor
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.serialization import safe_globals

from vlmdefend.errors import UserError

# Dassl's trainers (APT, AdvPT, FAP) save these objects of torch's beside the weights; weights_only makes no others
TORCHS_OWN: list[Any] = [SGD, CosineAnnealingLR, defaultdict, dict]
# TeCoA's files and its descendants' hold the image tower beside the "state_dict" of a prompt, which may be empty
NESTED = ("vision_encoder_state_dict", "state_dict", "model_state_dict", "model")
WRAPPERS = ("module.", "_orig_mod.")  # DataParallel, torch.compile


def read_contents(file: Path) -> Any:
    """Returns the content of the file: a dictionary of tensors by name, or a nested one of tensors, numbers and words.

    Pickles are read with ``weights_only=True``.

    Raises:
        UserError: damaged, or a pickle of more than tensors.
    """
    return _read_safetensors(file) if _is_safetensors(file) else _read_pickle(file)


def _is_safetensors(file: Path) -> bool:
    """Returns whether name or first bytes are those of a safetensors file."""
    if file.name.endswith((".safetensors", ".safetensors.xz")):
        return True
    with file.open("rb") as opened:
        return opened.read(10)[8:] == b'{"'


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".xz":
            found = file.stat()
            return dict(load_bytes(_decompressed(file, found.st_size, found.st_mtime_ns)))
        return dict(load_file(file))
    except (SafetensorError, lzma.LZMAError, EOFError, ValueError, OSError) as error:
        raise UserError(
            f"{file} is cut short or not a safetensors file ({_first_line(error)}); download or write it again."
        ) from None


@lru_cache(maxsize=4)
def _decompressed(file: Path, size: int, modified: int) -> bytes:
    """Returns the content of an .xz file; cached, since the embedded models are loaded again and again."""
    return lzma.decompress(file.read_bytes())


def _read_pickle(file: Path) -> Any:
    if _is_torchscript(file):
        raise UserError(
            f"{file} is a TorchScript archive, which holds code; turn it into tensors with "
            f"`python -c \"import torch; torch.save(torch.jit.load('{file}', 'cpu').state_dict(), 'weights.pt')\"` "
            "if you trust it, and give weights.pt."
        )
    try:
        with warnings.catch_warnings(), safe_globals(TORCHS_OWN):
            warnings.simplefilter("ignore")  # on pickle protocols; what cannot be read raises
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{file} is not a file of tensors alone, and nothing else is opened, since a pickle can run code; "
            "give the model's state dict alone, best as .safetensors."
        ) from None
    except MemoryError:  # no statement on the content of the file
        raise
    except Exception as error:  # zip, tar and pickle readers each have their own for a damaged file
        raise UserError(
            f"{file} is cut short or not a file of weights ({type(error).__name__}); download or write it again."
        ) from None


def _is_torchscript(file: Path) -> bool:
    try:
        with zipfile.ZipFile(file) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False


def plain_names(read: Any, file: Path) -> dict[str, Tensor]:
    """Opens nested dictionaries, keeps tensors, drops the prefixes that every name shares.

    Raises:
        UserError: there is no tensor with a name.
    """
    while isinstance(read, dict) and any(isinstance(read.get(key), dict) for key in NESTED):
        read = next(read[key] for key in NESTED if isinstance(read.get(key), dict))
    state = (
        {k: v for k, v in read.items() if isinstance(k, str) and isinstance(v, Tensor)}
        if isinstance(read, dict)
        else {}
    )
    if not state:
        raise UserError(f"{file} holds no named tensors; save the model's state dict, best as .safetensors.")
    return unwrapped(state)


def named_prompts(read: Any) -> str | None:
    """Returns the name of a tensor of a learned prompt, if the file is one that authors of prompt learning publish.

    TeCoA's visual prompts: ``add_prompter``, and a ``state_dict`` of the border. Prompt learners of Dassl's trainers:
    ``ctx``, alone or within a whole model.
    """
    if not isinstance(read, dict):
        return None
    states = [read.get(key) for key in ("state_dict", "add_prompter")]
    if "add_prompter" in read:
        return next((name for state in states if isinstance(state, dict) for name in state), None)
    state = states[0] if isinstance(states[0], dict) else read
    return next((name for name in state if str(name).removeprefix("module.") in ("ctx", "prompt_learner.ctx")), None)


def unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the state without the prefixes of DataParallel and torch.compile."""
    for prefix in WRAPPERS * 2:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")[:160]
