"""Runs the cells of a plan in this process: loads one model at a time and stores each cell as it finishes."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from vlmdefend.errors import StorageError, UserError
from vlmdefend.evaluation.grid.bind import bind, evaluator_of, prepare
from vlmdefend.evaluation.grid.grid import Grid
from vlmdefend.evaluation.grid.planned import Plan, PlannedCell
from vlmdefend.evaluation.make_plan import make_plan
from vlmdefend.evaluation.store.records import Cell, ImageRow, Record
from vlmdefend.evaluation.store.run_folder import Store
from vlmdefend.models import load_model
from vlmdefend.models.clip.vision_language import VisionLanguageModel
from vlmdefend.progress import Failure, Progress


@dataclass
class Evaluation:
    """The result of a grid: records with their rows, failures, and the number of cells reused from an earlier run."""

    results: list[tuple[Record, list[ImageRow]]] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    reused: int = 0


def evaluate(out: str | Path = "runs", **grid: Any) -> Evaluation:
    """Evaluates every combination of models, defenses, data sets, attacks, eps and seeds; the same call resumes.

    Args:
        out: the run folder.
        grid: the fields of :class:`~vlmdefend.evaluation.grid.grid.Grid`: ``model``, ``defense``, ``dataset``,
            ``attack``, ``eps`` ..., each a value, a list, or text with commas.

    Raises:
        UserError: bad input; nothing was computed. A cell that fails later is in ``failures`` instead.
    """
    return run_plan(make_plan(Grid.build({}, grid)), Store(out), Progress())


def run_plan(plan: Plan, store: Store, progress: Progress, *, debug: bool = False) -> Evaluation:
    """Computes the cells that ``store`` does not have yet.

    Args:
        debug: raise errors that are not the user's instead of recording them as the cell's failure.

    Raises:
        StorageError: the run folder cannot be written any more; finished cells are kept.
    """
    device = prepare(plan)
    contents = {images: images.content_hash() for images in dict.fromkeys(cell.images for cell in plan.cells)}
    evaluation = Evaluation()
    for name, group in groupby(plan.cells, key=lambda planned: planned.model):
        cells = list(group)
        try:
            model = load_model(name, weights=plan.grid.weights, device=device)
        except Exception as error:
            if debug and not isinstance(error, UserError):
                raise
            failure = _failure(f"model {name}", error)
            evaluation.failures.append(failure)
            for planned in cells:
                store.fail(bind(plan, planned, None, device, contents[planned.images]), failure.message)
            progress.fail(failure, sum(len(planned.images) for planned in cells), len(cells))
            continue
        for planned in cells:
            store.forget(bind(plan, planned, None, device, contents[planned.images]))
            cell = bind(plan, planned, model, device, contents[planned.images])
            try:
                _run_cell(plan, planned, model, cell, store, progress, evaluation)
            except StorageError:
                raise
            except Exception as error:
                if debug and not isinstance(error, UserError):
                    raise
                failure = _failure(cell.title(), error)
                evaluation.failures.append(failure)
                progress.fail(failure, len(planned.images))
    return evaluation


def _run_cell(
    plan: Plan,
    planned: PlannedCell,
    model: VisionLanguageModel,
    cell: Cell,
    store: Store,
    progress: Progress,
    evaluation: Evaluation,
) -> None:
    """Computes one cell, or reads its record if it is done, and adds the result to ``evaluation``."""
    progress.begin(cell, len(planned.images))
    with store.writing(cell) as writer:
        record = store.record(cell)
        reused = record is not None and record.status == "done"
        if record is not None and reused:
            rows = store.rows(record)
            progress.advance(cell, len(planned.images))
        else:
            try:
                record, rows = evaluator_of(plan, planned, model, cell).run(writer, progress)
            except StorageError:
                raise
            except Exception as error:
                writer.fail(_failure(cell.title(), error).message)
                raise
    evaluation.results.append((record, rows))
    evaluation.reused += reused
    progress.end(record, reused=reused)


def _failure(what: str, error: Exception) -> Failure:
    """Returns a failure with a message of one line; an error that is not the user's starts with its type."""
    is_users = isinstance(error, UserError)
    message = " ".join(str(error).split()).removeprefix(f"{what}: ")
    return Failure(what, message if is_users else f"{type(error).__name__}: {message}", is_users)
