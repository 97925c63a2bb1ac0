"""The folder of a training run: its lock, its settings, its summary, the models written into it.

``OUT`` is the result, a model folder in open_clip's format once the run is done; ``OUT/pivot`` is one from the end of
stage a. ``OUT/training`` holds ``settings.json``, ``log.jsonl``, ``state.safetensors`` and ``summary.json``.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlmdefend.errors import Busy, StorageError, UserError
from vlmdefend.models.weights.checkpoint import CONFIG
from vlmdefend.training.loop.state_file import write_whole

TRAINING, PIVOT = "training", "pivot"
SETTINGS, SUMMARY = "settings.json", "summary.json"


class RunFolder:
    """The output folder of one training run.

    Raises:
        UserError: the path is a file, or a folder that holds something else than a run.
    """

    def __init__(self, out: Path) -> None:
        self.out = out.expanduser()
        self.training, self.pivot = self.out / TRAINING, self.out / PIVOT
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"--out {out}: is a file; give a folder (it is created if needed).")
        if self.out.is_dir() and any(self.out.iterdir()) and not self.training.is_dir():
            what = "a model that this command did not make" if (self.out / CONFIG).is_file() else "other files"
            raise UserError(f"--out {out}: holds {what}; give a new folder, so that nothing is lost.")

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Holds the folder's lock; it ends with the process.

        Raises:
            Busy: another process trains into it.
            StorageError: it cannot be written.
        """
        try:
            self.training.mkdir(parents=True, exist_ok=True)
            lock = (self.training / "lock").open("a+")
        except OSError as error:
            raise StorageError(f"{self.out}: cannot be written ({error.strerror}); give another --out.") from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Busy(f"--out {self.out}: another process trains into it; wait, or give another --out.") from None
            except OSError as error:
                raise StorageError(
                    f"--out {self.out}: its disk cannot lock files ({error.strerror}); give one on another disk."
                ) from None
            yield

    def check_settings(self, settings: dict[str, Any]) -> None:
        """Writes the settings, or compares them with those that the run was begun with.

        Raises:
            UserError: names the first that differs.
        """
        file = self.training / SETTINGS
        if not file.exists():
            write_whole(file, (json.dumps(settings, indent=1) + "\n").encode())
            return
        before = self._read(file)
        for name, value in settings.items():
            if before.get(name) != value:
                raise UserError(
                    f"--out {self.out}: holds a run with {name} = {before.get(name)!r}, now it is {value!r}; give "
                    "another --out, or the old settings to go on."
                )

    def summary(self) -> dict[str, Any]:
        """Returns what was measured so far; empty if nothing."""
        file = self.training / SUMMARY
        return self._read(file) if file.exists() else {}

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Writes what was measured."""
        write_whole(self.training / SUMMARY, (json.dumps(summary, indent=1, allow_nan=False) + "\n").encode())

    def _read(self, file: Path) -> dict[str, Any]:
        try:
            data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise UserError(f"{file}: is not whole; delete {self.training} to start over.") from None
        return data
