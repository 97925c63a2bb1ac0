"""Hashes of code and files in a cell's key: after an edit the cell is computed again."""

from __future__ import annotations

import hashlib
import inspect
from errno import EACCES, ENAMETOOLONG
from functools import cache
from itertools import islice
from os import R_OK, access, strerror
from pathlib import Path
from uuid import uuid4

from vlmdefend.attacks.base import Attack
from vlmdefend.defenses.base import Defense
from vlmdefend.errors import UserError

FILES = 1000  # the most files that an option's folder may hold
PARTS = ("rng.py", "types.py", "data", "models", "kernels", "attacks", "defenses", "evaluation")


def code_hash(method: Attack | Defense) -> dict[str, str]:
    """Returns hashes of a plugin's source file, and of files that a method's options name.

    The same for every method inside of it (``method.inner``).
    """
    parts: tuple[Attack | Defense, ...] = method.inner
    found = {
        key.replace("_hash", f"_hash_{i}", 1): digest
        for i, one in enumerate(parts)
        for key, digest in code_hash(one).items()
    }
    options = method.spec().items() if not parts else ()
    found |= {f"{name}_hash": digest for name, value in options if (digest := _content(f"{method.name}:{name}", value))}
    if type(method).__module__.partition(".")[0] == "vlmdefend":
        return found
    try:
        code = Path(inspect.getsourcefile(type(method)) or "").read_bytes()
    except (TypeError, OSError):
        try:
            code = inspect.getsource(type(method)).encode()  # code in a notebook
        except (TypeError, OSError):
            code = uuid4().bytes  # without source the code may have changed: never reuse
    return {"file_hash": hashlib.sha256(code).hexdigest()[:8], **found}


def check_files(method: Attack | Defense) -> None:
    """Checks that the files named by a method's options can be read, without reading them.

    Raises:
        UserError: a file without read permission, or a folder with too many files.
    """
    for part in method.inner:
        check_files(part)
    for name, value in method.spec().items() if not method.inner else ():
        _named(f"{method.name}:{name}", value)


def _content(option: str, value: object) -> str:
    """Returns a hash of the file or of the folder's files that an option names; empty if it names none."""
    files = _named(option, value)
    if files is None:
        return ""
    place = Path(str(value)).expanduser()
    try:
        if files == [place]:
            return hashlib.sha256(place.read_bytes()).hexdigest()[:8]
        return _of_files(place, files)
    except OSError as error:
        raise _unreadable(option, value, error) from None


def _named(option: str, value: object) -> list[Path] | None:
    """Returns the file that an option names, or the regular files in the folder; None if it names neither."""
    if not isinstance(value, str) or not ("/" in value or "." in value):
        return None  # a word, such as a data set's name, even if a folder has that name
    try:
        place = Path(value).expanduser()
        if place.is_file():
            files = [place]
        elif place.is_dir():
            files = sorted(islice((file for file in place.rglob("*") if file.is_file()), FILES + 1))
        else:
            return None
    except RuntimeError:  # ~name without such a user
        return None
    except OSError as error:
        if error.errno == ENAMETOOLONG:
            return None
        raise _unreadable(option, value, error) from None
    if len(files) > FILES:
        raise UserError(
            f"{option}={value!r}: is a folder of more than {FILES} files; name the file or the folder that it reads."
        )
    if closed := next((file for file in files if not access(file, R_OK)), None):
        raise _unreadable(option, value, PermissionError(EACCES, strerror(EACCES), str(closed)))
    return files


def _unreadable(option: str, value: object, error: OSError) -> UserError:
    return UserError(
        f"{option}={value!r}: {error.filename or value} cannot be read ({error.strerror or error}); name a file or a "
        "folder that you may read."
    )


@cache
def package_hash() -> str:
    """Returns a hash of the package's code that computes results, so that a changed attack is run again."""
    package = Path(__file__).parents[2]
    files = sorted(
        file
        for part in PARTS
        for file in ([package / part] if part.endswith(".py") else (package / part).rglob("*.py"))
    )
    return _of_files(package, files)


def _of_files(folder: Path, files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:8]
