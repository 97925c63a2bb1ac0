"""The run folder: writes cells atomically, resumes half-done cells, allows one writer per cell.

``OUT/cells/KEY/`` holds ``record.json`` and ``rows.jsonl`` when the cell is done; until then ``partial.jsonl``, one
line per finished shard, appended and flushed to disk, so that a kill loses at most the shard that was running.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from vlmdefend.errors import Busy, StorageError, UserError
from vlmdefend.evaluation.store.records import SCHEMA_VERSION, Cell, Checks, Cost, ImageRow, Record, Skipped


class StoredShard(NamedTuple):
    """Rows, checks and cost of one shard of a cell."""

    number: int
    rows: list[ImageRow]
    skipped: list[Skipped]
    cost: Cost
    checks: Checks


class Store:
    """A run folder: one folder per cell.

    Raises:
        UserError: the path is a file, or cannot be created or written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        if self.folder.exists() and not self.folder.is_dir():
            raise StorageError(f"--out {folder}: is a file, not a folder; give a folder (it is created if needed).")
        with disk(self.folder):
            (self.folder / "cells").mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(
                dir=self.folder / "cells"
            ).close()  # fails now, not after hours, if the folder is read-only

    def cell_folder(self, key: str) -> Path:
        """Returns the folder of the cell with this key."""
        return self.folder / "cells" / key

    def record(self, cell: Cell) -> Record | None:
        """Returns the finished record of ``cell``, or None."""
        file = self.cell_folder(cell.key) / "record.json"
        return read_record(file) if file.exists() else None

    @contextmanager
    def writing(self, cell: Cell) -> Iterator[CellWriter]:
        """Returns a context that holds the cell's lock and gives its writer; the lock ends with the process.

        Raises:
            Busy: another process holds the lock.
        """
        folder = self.cell_folder(cell.key)
        with disk(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = (folder / "lock").open("a+")
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Busy(
                    f"{cell.title()}: another process is writing this cell in {self.folder}; wait for it "
                    "(the same command then finds the result), or give another --out."
                ) from None
            except OSError as error:
                raise StorageError(
                    f"{self.folder}: its disk cannot lock files ({error.strerror}); give an --out on another disk."
                ) from None
            yield CellWriter(folder, cell)
        finally:
            lock.close()

    def fail(self, cell: Cell, message: str) -> None:
        """Records why ``cell`` has no result, unless another process computes it."""
        with contextlib.suppress(Busy), self.writing(cell) as writer:
            writer.fail(message)

    def forget(self, cell: Cell) -> None:
        """Removes a recorded failure that no longer holds."""
        with disk(self.folder):
            (self.cell_folder(cell.key) / "record.json").unlink(missing_ok=True)

    def records(self) -> list[Record]:
        """Returns every record of the folder, in a stable order."""
        return [read_record(file) for file in sorted(self.folder.glob("cells/*/record.json"))]

    def rows(self, record: Record) -> list[ImageRow]:
        """Returns the per-image rows of a finished cell.

        Raises:
            UserError: missing, cut off, or fewer or more rows than the record counts.
        """
        file = self.cell_folder(record.key) / "rows.jsonl"
        rows = read_rows(file)
        if len(rows) != record.n:
            raise UserError(
                f"{file}: holds {len(rows)} images where its record says {record.n}; delete the folder {file.parent} "
                "and run the same command again."
            )
        return rows


class CellWriter:
    """Writes one cell, shard by shard."""

    def __init__(self, folder: Path, cell: Cell) -> None:
        self.folder = folder
        self.cell = cell
        self._partial = folder / "partial.jsonl"

    def finished_shards(self) -> list[StoredShard]:
        """Returns the shards of an interrupted run, in order; a line cut by a kill is removed from the file."""
        if not self._partial.exists():
            return []
        shards: list[StoredShard] = []
        good_bytes = 0
        for line in self._partial.read_bytes().splitlines(keepends=True):
            try:
                if not line.endswith(b"\n"):
                    break
                data = json.loads(line)
                shard = StoredShard(
                    data["shard"],
                    [ImageRow(**row) for row in data["rows"]],
                    [Skipped(**s) for s in data["skipped"]],
                    Cost(**data["cost"]),
                    Checks(**data["checks"]),
                )
            except (ValueError, KeyError, TypeError):
                break
            if shard.number != len(shards):
                break
            shards.append(shard)
            good_bytes += len(line)
        with disk(self._partial):
            os.truncate(self._partial, good_bytes)
        return shards

    def add(self, shard: StoredShard) -> None:
        """Appends a finished shard and flushes it to the disk."""
        line = json.dumps(
            {
                "shard": shard.number,
                "rows": [row.model_dump() for row in shard.rows],
                "skipped": [s.model_dump() for s in shard.skipped],
                "cost": shard.cost.model_dump(),
                "checks": shard.checks.model_dump(),
            },
            allow_nan=False,
        )
        with disk(self._partial):
            before = self._partial.stat().st_size if self._partial.exists() else 0
            try:
                with self._partial.open("ab") as file:
                    file.write(line.encode() + b"\n")
                    file.flush()
                    os.fsync(file.fileno())
            except OSError:
                if self._partial.exists():
                    os.truncate(self._partial, before)
                raise

    def fail(self, message: str) -> None:
        """Records why the cell has no result; finished shards stay for the next run."""
        record = Record(key=self.cell.key, cell=self.cell, status="error", error=message, finished=_now())
        with disk(self.folder):
            write_atomically(self.folder / "record.json", record.model_dump_json(indent=1) + "\n")

    def finish(self, record: Record, rows: list[ImageRow]) -> None:
        """Writes rows, then the record (which marks the cell as done), then removes the partial file."""
        with disk(self.folder):
            write_atomically(self.folder / "rows.jsonl", "".join(row.model_dump_json() + "\n" for row in rows))
            write_atomically(self.folder / "record.json", record.model_dump_json(indent=1) + "\n")
            self._partial.unlink(missing_ok=True)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def write_atomically(file: Path, text: str) -> None:
    """Writes a whole file or none: temporary file in the same folder, flushed, renamed."""
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as temporary:
            temporary.write(text)
            temporary.flush()
            os.fsync(temporary.fileno())
        os.chmod(name, 0o644)
        os.replace(name, file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read_record(file: Path) -> Record:
    """Reads and validates a record.

    Raises:
        UserError: the file is cut off, not a record, or of a newer schema.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        version = data.get("schema_version") if isinstance(data, dict) else None
    except (ValueError, UnicodeDecodeError):
        raise UserError(
            f"{file}: is not a whole record (cut off or edited); delete the folder {file.parent} and run the same "
            "command again to compute it anew."
        ) from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}.") from None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise UserError(
            f"{file}: has record schema {version}, this vlmdefend reads up to {SCHEMA_VERSION}; "
            "upgrade vlmdefend to read it."
        )
    try:
        return Record.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "record"
        raise UserError(
            f"{file}: is not a valid record ({where}: {first['msg']}); delete the folder {file.parent} and run the "
            "same command again."
        ) from None


def read_rows(file: Path) -> list[ImageRow]:
    """Reads and validates per-image rows.

    Raises:
        UserError: missing or cut off.
    """
    try:
        # not splitlines: an id may contain another line separator of Unicode
        return [ImageRow.model_validate_json(line) for line in file.read_bytes().removesuffix(b"\n").split(b"\n")]
    except (ValidationError, UnicodeDecodeError):
        raise UserError(
            f"{file}: holds a line that is not a row (cut off or edited); delete the folder {file.parent} and run the "
            "same command again."
        ) from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}.") from None


@contextmanager
def disk(path: Path) -> Iterator[None]:
    """Returns a context that turns errors of the disk into a StorageError of one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StorageError(
                f"{path}: no space left to write; finished cells are kept. Free some space and run the same command "
                "again to go on."
            ) from None
        raise StorageError(f"{path}: cannot be written ({error.strerror or error}); give another --out.") from None
