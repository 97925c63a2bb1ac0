"""Crafts one set: attacks as ``evaluate`` does, keeps the images of each shard, checks the written files."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vlmdefend.data.base import ImageSet
from vlmdefend.data.loader import load_batch
from vlmdefend.data.transforms import PixelTransform
from vlmdefend.errors import StorageError, UserError
from vlmdefend.evaluation.adversarial_sets.adversarial_set import AdversarialSet
from vlmdefend.evaluation.adversarial_sets.png import Pngs, write_pngs
from vlmdefend.evaluation.adversarial_sets.set_format import (
    INDEX,
    MANIFEST,
    SHEET,
    ImageFile,
    IndexRow,
    Manifest,
    clean_hash,
    json_lines,
    manifest_text,
    write_whole,
)
from vlmdefend.evaluation.grid.bind import bind, evaluator_of, prepare, templates_of
from vlmdefend.evaluation.grid.planned import Plan
from vlmdefend.evaluation.store.records import Cell, ImageRow, Record
from vlmdefend.evaluation.store.run_folder import Store, disk
from vlmdefend.models import load_model
from vlmdefend.progress import Progress
from vlmdefend.types import Threat


@dataclass(frozen=True)
class CraftedSet:
    """A finished set, with its record, clean images and PNG files."""

    saved: AdversarialSet
    record: Record
    images: ImageSet  # clean, in the order of the set's rows
    transform: PixelTransform
    pngs: Pngs | None
    reused: bool  # an earlier run had finished it


def craft_set(plan: Plan, out: Path, progress: Progress, *, png: bool = False) -> CraftedSet:
    """Crafts the one cell of ``plan`` into ``out``; the same call resumes where a killed one stopped.

    Raises:
        UserError: more than one cell, a threat that leaves the pixels alone, or another set in ``out``.
        StorageError: ``out`` cannot be written; finished shards are kept.
    """
    check_plan(plan)
    (planned,) = plan.cells
    store = Store(out)
    device = prepare(plan)
    model = load_model(planned.model, weights=plan.grid.weights, device=device)
    cell = bind(plan, planned, model, device, planned.images.content_hash())
    _refuse_another(store, cell)
    evaluator = evaluator_of(plan, planned, model, cell)
    progress.begin(cell, len(planned.images))
    with store.writing(cell) as writer:
        record = store.record(cell)
        reused = record is not None and record.status == "done"
        if record is not None and reused:
            rows = store.rows(record)
            progress.advance(cell, len(planned.images))
        else:
            (store.folder / MANIFEST).unlink(missing_ok=True)  # its image files are about to be replaced
            evaluator.keep = lambda number, images: _write_images(store.folder, number, images)
            record, rows = evaluator.run(writer, progress)
        place = {name: i for i, name in enumerate(planned.images.ids)}
        images = planned.images.select([place[row.id] for row in rows])  # without unreadable images
        pngs = None
        with disk(store.folder):
            if not (store.folder / MANIFEST).exists():
                about = {
                    "protocol": plan.protocol,
                    "class_names": images.class_names,
                    "templates": templates_of(plan, planned),
                }
                _write_index_and_manifest(store.folder, record, rows, images, evaluator.transform, about)
            saved = AdversarialSet.open(store.folder)
            if png:
                pngs = write_pngs(
                    saved, images, evaluator.transform, lambda p, ids: evaluator.deployed.predict(p.to(device), ids)
                )
    progress.end(record, reused=reused)
    return CraftedSet(saved, record, images, evaluator.transform, pngs, reused)


def check_plan(plan: Plan) -> None:
    """Refuses a plan that is not one set of images.

    Raises:
        UserError: several cells, or an attack that changes no pixel.
    """
    if len(plan.cells) != 1:
        lists = ("model", "defense", "dataset", "attack", "eps", "attacker", "seed")
        several = [name for name in lists if len(getattr(plan.grid, name) or ()) > 1]
        what = f"--{several[0]} has several values" if several else f"--eps: the default is {len(plan.cells)} radii"
        raise UserError(f"{what}, but a set has one model, attack and eps; give one value, for example --eps 4/255.")
    (planned,) = plan.cells
    if planned.attack.name == "none":
        raise UserError("--attack none: leaves the images as they are; choose one of `vlmdefend list attacks`.")
    if planned.norm == "tokens" or planned.attack.changes_prompts:
        only = planned.norm == "tokens"
        why = ", not the images, so there is no image to save" if only else " too, and a set of images cannot hold them"
        raise UserError(f"--attack {planned.attack.name}: changes the prompts{why}; `vlmdefend evaluate` runs it.")


def _refuse_another(store: Store, cell: Cell) -> None:
    """Refuses a folder that holds another set."""
    begun = [*store.folder.glob("cells/*/record.json"), *store.folder.glob("cells/*/partial.jsonl")]
    other = next((file.parent for file in begun if file.parent.name != cell.key), None)
    if other is None:
        return
    differs = ""
    try:
        there = json.loads((other / "record.json").read_text(encoding="utf-8"))["cell"]
        here = cell.model_dump(mode="json")
        names = [name for name in here if there.get(name) != here[name]]
        differs = (
            f" (it differs in {', '.join(names[:4])})".replace("code_hash", "the code of vlmdefend") if names else ""
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise StorageError(f"--out {store.folder}: holds another set or run{differs}; give a folder of its own.")


def _write_images(folder: Path, number: int, images: Tensor) -> None:
    """Writes the images of a shard; the evaluator notes the shard as done only afterwards."""
    from safetensors.torch import save

    with disk(folder):
        write_whole(folder / _file_name(number), save({"images": images.cpu().contiguous()}))


def _file_name(number: int) -> str:
    return f"images-{number:05d}.safetensors"


def _write_index_and_manifest(
    folder: Path,
    record: Record,
    rows: Sequence[ImageRow],
    images: ImageSet,
    transform: PixelTransform,
    about: dict[str, Any],
) -> None:
    """Checks the written files against the clean images and the rows, then writes index and manifest."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    cell = record.cell
    threat = Threat(cell.norm, cell.eps)
    index: list[IndexRow] = []
    files: list[ImageFile] = []
    for number in range(-(-cell.n // cell.shard_size)):
        file = folder / _file_name(number)
        if not file.exists():  # every image of the shard was skipped; otherwise the count below differs
            continue
        content = file.read_bytes()
        try:
            found = load(content)["images"]
        except (SafetensorError, KeyError):
            raise _changed_error(file) from None
        own = rows[len(index) : len(index) + len(found)]
        if len(own) != len(found):
            raise _changed_error(file)
        clean = load_batch(images, range(len(index), len(index) + len(own)), transform, skip_bad=False)[0].images
        distance = threat.distance(found, clean) if found.shape == clean.shape else None
        measured = [row.distance for row in own]
        if distance is None or not threat.contains(found, clean).all() or not _equal(distance.tolist(), measured):
            raise _changed_error(file)
        for position, row in enumerate(own):
            index.append(
                IndexRow(
                    **row.model_dump(),
                    number=len(index),
                    file=file.name,
                    position=position,
                    fooled=row.clean_correct and not row.robust,
                    clean_hash=clean_hash(clean[position]),
                )
            )
        files.append(ImageFile.of(file.name, content))
    if len(index) != len(rows):
        raise _changed_error(folder / _file_name(len(files)))
    objects = [row.model_dump() for row in index]
    lines = json_lines(objects)
    write_whole(folder / INDEX, lines)
    _write_parquet(folder / "index.parquet", objects)
    manifest = Manifest(
        key=record.key,
        cell=cell,
        n=len(index),
        clean_correct=record.clean_correct,
        fooled=sum(row.fooled for row in index),
        largest_distance=max(row.distance for row in index),
        ids_hash=images.ids_hash,
        images_hash=images.content_hash(),
        index=ImageFile.of(INDEX, lines),
        images=tuple(files),
        environment=record.environment,
        **about,
    )
    for outdated in (folder / "png" / INDEX, folder / SHEET):  # made from an earlier set
        outdated.unlink(missing_ok=True)
    write_whole(folder / MANIFEST, manifest_text(manifest))


def _equal(found: list[float], measured: list[float]) -> bool:
    """Returns whether two distances are equal up to the order of summation on a GPU."""
    return all(abs(a - b) <= 1e-9 for a, b in zip(found, measured, strict=True))


def _changed_error(file: Path) -> UserError:
    """Returns the error for a file that does not hold the scored images."""
    return UserError(
        f"{file}: does not hold what was scored (missing, cut off, edited, or the data set changed meanwhile); delete "
        f"the folder {file.parent} and run the same command again."
    )


def _write_parquet(file: Path, rows: list[dict[str, Any]]) -> None:
    """Writes the index as Parquet, if pyarrow is installed."""
    try:
        import pyarrow  # type: ignore[import-untyped]
        import pyarrow.parquet  # type: ignore[import-untyped]
    except ImportError:
        return
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    write_whole(file, buffer.getvalue())
