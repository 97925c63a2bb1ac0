"""Hashes in a cell's key, so that code or files that were edited do not find their old numbers done."""

from __future__ import annotations

import hashlib
import inspect
from functools import cache
from pathlib import Path
from uuid import uuid4

from vlmdefend.attacks.base import Attack
from vlmdefend.defenses.base import Defense

ROOMS = ("rng.py", "types.py", "data", "models", "kernels", "attacks", "defenses", "evaluation")


def code_hash(method: Attack | Defense) -> dict[str, str]:
    """What a method depends on beside its options: its own file where it is not of this package, and files it names.

    So too for those inside of it.
    """
    parts: tuple[Attack | Defense, ...] = method.inner
    found = {
        key.replace("_hash", f"_hash_{i}", 1): digest
        for i, one in enumerate(parts)
        for key, digest in code_hash(one).items()
    }
    options = method.spec().items() if not parts else ()
    found |= {f"{name}_hash": digest for name, value in options if (digest := _content(value))}
    if type(method).__module__.partition(".")[0] == "vlmdefend":
        return found
    try:
        code = Path(inspect.getsourcefile(type(method)) or "").read_bytes()
    except (TypeError, OSError):
        try:
            code = inspect.getsource(type(method)).encode()  # a notebook's cell
        except (TypeError, OSError):
            code = uuid4().bytes  # nobody can tell whether it is the same: never reuse
    return {"file_hash": hashlib.sha256(code).hexdigest()[:8], **found}


def _content(option: object) -> str:
    """A hash of the file or of the folder's files that an option names; empty if it names none."""
    if not isinstance(option, str) or not ("/" in option or "." in option):
        return ""  # a word, such as a data set's name, though a folder may have the same
    place = Path(option).expanduser()
    if place.is_file():
        return hashlib.sha256(place.read_bytes()).hexdigest()[:8]
    return _of_files(place, sorted(file for file in place.rglob("*") if file.is_file())) if place.is_dir() else ""


@cache
def house_hash() -> str:
    """A hash of the code that computes results, so that a mended attack does not find the old numbers done."""
    house = Path(__file__).parent.parent
    files = sorted(
        file for room in ROOMS for file in ([house / room] if room.endswith(".py") else (house / room).rglob("*.py"))
    )
    return _of_files(house, files)


def _of_files(folder: Path, files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:8]
