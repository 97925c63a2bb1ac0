"""Training on features that are computed once, before the first step, in place of images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng
from vlmdefend.training.clip.student import ClipStudent
from vlmdefend.training.loop.data import TrainingImages, epoch_order
from vlmdefend.training.loop.state_file import load_state, save_state
from vlmdefend.types import Batch

if TYPE_CHECKING:
    from vlmdefend.defenses.training_time.base import Student

FILE = "features.safetensors"
AT_ONCE = 64  # images per batch when features are computed


@runtime_checkable
class StoresFeatures(Protocol):
    """Protocol of an objective that trains on features which it computes once for each image."""

    def stored(self, student: Student, batch: Batch, rng: ImageRng) -> Tensor:
        """Returns the (B, D) features of a batch of images."""
        ...


class StoredFeatures:
    """Training data whose batches hold (B, D) features; satisfies :class:`~vlmdefend.training.loop.data.Images`.

    Args:
        images: from which the features were computed.
        rows: (N,) index of each feature's image in ``images``.
        features: (N, D).
    """

    def __init__(self, images: TrainingImages, rows: Tensor, features: Tensor) -> None:
        self.images, self.rows, self.features = images.images, rows, features

    def __len__(self) -> int:
        return len(self.rows)

    def order(self, seed: int, purpose: str) -> list[int]:
        """Returns the order of one epoch: every row once."""
        return epoch_order(len(self), seed, purpose)

    def stream(self, parts: Sequence[Sequence[int]]) -> Iterator[Batch]:
        """Yields one batch for each list of row numbers."""
        for part in parts:
            rows = self.rows[list(part)].tolist()
            labels = torch.tensor([self.images.labels[row] for row in rows], dtype=torch.int64)
            yield Batch([self.images.ids[row] for row in rows], self.features[list(part)], labels)


def store_features(
    objective: StoresFeatures, student: ClipStudent, images: TrainingImages, folder: Path, seed: int
) -> StoredFeatures:
    """Computes the features of all images, or reads those of an earlier run from ``folder``.

    The main process computes and writes them, in the same batches in every run; the others wait and read the file.

    Args:
        objective: computes the features.
        student: before its first step.
        images: whose features are stored; those that cannot be read are left out if they may be skipped.
        folder: where ``features.safetensors`` lies.
        seed: of the objective's draws.

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
            raise UserError("no training image could be read; repair the data set.")
        save_state(file, {"stored": {"rows": torch.tensor(rows), "features": torch.cat(found)}}, {})
    processes.wait()
    groups, _ = load_state(file)
    return StoredFeatures(images, groups["stored"]["rows"], groups["stored"]["features"])
