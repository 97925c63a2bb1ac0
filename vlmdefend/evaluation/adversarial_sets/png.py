"""A saved set as PNG files: rounded to 8 bits inside the budget, read again, predicted again.

``DIR/png/00000.png`` is image 0 of the set; ``DIR/png/index.jsonl``, written last, holds one :class:`PngRow` per image.
Truncating to 8 bits, as most toolkits do, weakens an attack and may leave its ball. So each pixel takes the nearest
level inside the ball, and the model predicts the pixels that are read back from the file.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vlmdefend.attacks.criterion import Criterion
from vlmdefend.data.base import ImageSet
from vlmdefend.data.images import decode
from vlmdefend.data.loader import load_batch
from vlmdefend.data.transforms import PixelTransform
from vlmdefend.errors import UserError
from vlmdefend.evaluation.adversarial_sets.adversarial_set import AdversarialSet
from vlmdefend.evaluation.adversarial_sets.set_format import INDEX, IndexRow, json_lines, write_whole
from vlmdefend.evaluation.store.records import ImageRow
from vlmdefend.types import Outputs, Threat, per_image

TOLERANCE = 1e-6  # of Threat.contains
HALVINGS = 12


class PngRow(ImageRow):
    """One PNG file: its predictions, margin and distance."""

    number: int
    file: str
    fooled: bool
    inside: bool  # the pixels of the file are inside the budget


class Pngs(NamedTuple):
    """Counts over the PNG files of a set: fooled, outside the budget, largest distance."""

    n: int
    fooled: int
    outside: int
    largest_distance: float


Predict = Callable[[Tensor, list[str]], Outputs]  # (B, 3, H, W) and B ids -> outputs of the deployed pipeline


def write_pngs(saved: AdversarialSet, images: ImageSet, transform: PixelTransform, predict: Predict) -> Pngs:
    """Writes the folder ``png``, or reads the finished one.

    Args:
        saved: the set.
        images: its clean images, in the order of its rows.
        transform: turns an image file into the pixels that were attacked.
        predict: the pipeline that the set was crafted against.
    """
    folder = saved.folder / "png"
    folder.mkdir(exist_ok=True)
    rows = _read(folder / INDEX, saved)
    if rows is None:
        rows = []
        for file in saved.manifest.images:  # the batches that were scored
            own = [row for row in saved.rows if row.file == file.name]
            clean = load_batch(images, [row.number for row in own], transform, skip_bad=False)[0].images
            rows += _write(folder, own, to_levels(saved.pixels(file.name), clean, saved.threat), clean, saved, predict)
        write_whole(folder / INDEX, json_lines([row.model_dump() for row in rows]))
    return Pngs(
        len(rows),
        sum(row.fooled and row.inside for row in rows),
        sum(not row.inside for row in rows),
        max(row.distance for row in rows),
    )


def to_levels(images: Tensor, clean: Tensor, threat: Threat) -> Tensor:
    """Rounds (B, 3, H, W) in [0, 1] to uint8 levels, inside the ball wherever a level is.

    L_inf: each pixel takes the nearest of the levels inside ``[clean - eps, clean + eps]``. L2: where the nearest
    levels lie outside, the perturbation is shrunk before it is rounded, by the least factor that stays in the ball. A
    clean image of :class:`PixelTransform` consists of 8-bit levels, so both always succeed; around other pixels the
    ball may hold no level, and the nearest is taken. Other threats: the nearest level, so an unchanged pixel stays.
    """
    wanted = (images.double() * 255).round()
    if threat.norm == "linf":
        low = ((clean.double() - threat.eps - TOLERANCE) * 255).ceil()
        high = ((clean.double() + threat.eps + TOLERANCE) * 255).floor()
        wanted = torch.where(low <= high, wanted.maximum(low).minimum(high), wanted)
    if threat.norm == "l2":
        wanted = _shrunk(images.double(), clean.double(), wanted, threat)
    return wanted.clamp(0, 255).to(torch.uint8)


def to_pixels(levels: Tensor) -> Tensor:
    """Turns uint8 levels into float32 in [0, 1], as a file is read."""
    return levels.float().div(255)


def _shrunk(images: Tensor, clean: Tensor, wanted: Tensor, threat: Threat) -> Tensor:
    """Returns levels of the perturbation scaled into the ball, by bisection over the factor (0 clean, 1 unscaled)."""
    inside, outside = torch.zeros(len(images), dtype=torch.float64), torch.ones(len(images), dtype=torch.float64)
    best = wanted.clamp(0, 255)
    fits = threat.contains(to_pixels(best), clean, TOLERANCE)
    for _ in range(HALVINGS):
        factor = (inside + outside) / 2
        tried = ((clean + per_image(factor, clean) * (images - clean)) * 255).round().clamp(0, 255)
        kept = threat.contains(to_pixels(tried), clean, TOLERANCE)
        best = torch.where(per_image(kept & ~fits, best), tried, best)
        inside, outside = torch.where(kept, factor, inside), torch.where(kept, outside, factor)
    return best


def _write(
    folder: Path, own: list[IndexRow], levels: Tensor, clean: Tensor, saved: AdversarialSet, predict: Predict
) -> list[PngRow]:
    """Writes some files, reads them again and predicts them."""
    from PIL import Image

    files = [f"{row.number:05d}.png" for row in own]
    for file, picture in zip(files, levels, strict=True):
        buffer = io.BytesIO()
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(buffer, "PNG")
        temporary = folder / f".{file}.part"
        temporary.write_bytes(buffer.getvalue())
        os.replace(temporary, folder / file)
    unresized = PixelTransform(None)
    read = torch.stack([unresized(decode(folder / file, file, upright=False)) for file in files])
    if not torch.equal(read, to_pixels(levels)):
        raise UserError(f"{folder}: a PNG file does not hold what was written; check the disk and run again.")
    found = predict(read, [row.id for row in own])
    predictions = found.predictions.tolist()
    margins = Criterion(torch.tensor([row.label for row in own])).margin(found.logits.cpu()).tolist()
    scores = None if found.detector_score is None else found.detector_score.tolist()
    distance = saved.threat.distance(read, clean).tolist()
    inside = saved.threat.contains(read, clean, TOLERANCE).tolist()
    return [
        PngRow(
            **row.model_dump(include=set(ImageRow.model_fields))
            | {
                "adversarial_prediction": predictions[i],
                "adversarial_margin": margins[i],
                "distance": distance[i],
                "adversarial_score": None if scores is None or row.adversarial_score is None else scores[i],
            },
            number=row.number,
            file=file,
            fooled=row.clean_correct and predictions[i] != row.label,
            inside=inside[i],
        )
        for i, (row, file) in enumerate(zip(own, files, strict=True))
    ]


def _read(index: Path, saved: AdversarialSet) -> list[PngRow] | None:
    """Returns the rows of a finished folder; None if rows or files are missing."""
    try:
        rows = [PngRow.model_validate_json(line) for line in index.read_bytes().removesuffix(b"\n").split(b"\n")]
    except (OSError, ValueError):
        return None
    complete = len(rows) == len(saved.rows) and all((index.parent / row.file).is_file() for row in rows)
    return rows if complete else None
