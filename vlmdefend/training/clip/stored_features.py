"""Training on features that are made once, before the first step, in place of images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng
from vlmdefend.training.loop.data import TrainingImages, epoch_order
from vlmdefend.training.loop.state_file import load_state, save_state
from vlmdefend.training.loop.student import TrainedStudent
from vlmdefend.types import Batch

if TYPE_CHECKING:
    from vlmdefend.defenses.training_time.base import Student

FILE = "features.safetensors"
AT_ONCE = 64


@runtime_checkable
class StoresFeatures(Protocol):
    """An objective that trains on what it makes of each image once."""

    def stored(self, student: Student, batch: Batch, rng: ImageRng) -> Tensor:
        """(B, D)."""
        ...


class StoredFeatures:
    """Satisfies :class:`~vlmdefend.training.loop.data.Images`: the ``images`` of its batches are (B, D) features.

    Args:
        images: that the features are of.
        rows: (N,) which of them.
        features: (N, D).
    """

    def __init__(self, images: TrainingImages, rows: Tensor, features: Tensor) -> None:
        self.images, self.rows, self.features = images.images, rows, features

    def __len__(self) -> int:
        return len(self.rows)

    def order(self, seed: int, purpose: str) -> list[int]:
        """Every image once."""
        return epoch_order(len(self), seed, purpose)

    def stream(self, parts: Sequence[Sequence[int]]) -> Iterator[Batch]:
        """One batch after the other."""
        for part in parts:
            rows = self.rows[list(part)].tolist()
            labels = torch.tensor([self.images.labels[row] for row in rows], dtype=torch.int64)
            yield Batch([self.images.ids[row] for row in rows], self.features[list(part)], labels)


def store_features(
    objective: StoresFeatures, student: TrainedStudent, images: TrainingImages, folder: Path, seed: int
) -> StoredFeatures:
    """Make the features of all images, in batches that are always the same, or read those that a run before made.

    The main process makes them; the others wait and read.

    Raises:
        UserError: no image could be read.
    """
    file, processes = folder / FILE, student.processes
    if processes.is_main and not file.exists():
        rows, found = [], []
        for first in range(0, len(images), AT_ONCE):
            index = list(range(first, min(first + AT_ONCE, len(images))))
            batch = images.batch(index)
            row_of = {images.images.ids[i]: i for i in index}
            rows += [row_of[name] for name in batch.ids]
            if batch.ids:
                placed = Batch(batch.ids, batch.images.to(processes.device), batch.labels.to(processes.device))
                found.append(objective.stored(student, placed, ImageRng(seed, batch.ids, "stored")).cpu())
        if not found:
            raise UserError("no training image could be read; mend the data set.")
        save_state(file, {"stored": {"rows": torch.tensor(rows), "features": torch.cat(found)}}, {})
    processes.wait()
    groups, _ = load_state(file)
    return StoredFeatures(images, groups["stored"]["rows"], groups["stored"]["features"])
