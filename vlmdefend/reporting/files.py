"""Writes a report file completely or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from vlmdefend.errors import UserError


def save(content: str | bytes, file: Path) -> None:
    """Writes ``content`` beside ``file`` and renames it, so that a failure leaves the old file.

    Raises:
        UserError: the folder is missing or cannot be written, or the disk is full.
    """
    if file.is_dir():
        raise UserError(f"--out {file}: is a folder; give a file name in it.")
    temporary = ""
    try:
        handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
        with os.fdopen(handle, "wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, file)
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise UserError(f"--out {file}: cannot be written: {error.strerror}.") from None
