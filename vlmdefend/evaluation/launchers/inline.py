"""Run a grid: load one model at a time, judge its cells, store each as it is done, go on after a failure."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from vlmdefend.data.transforms import PixelTransform
from vlmdefend.errors import StorageError, UserError
from vlmdefend.evaluation.cell.evaluator import Judge
from vlmdefend.evaluation.grid.grid import Grid
from vlmdefend.evaluation.grid.plan import Plan, Planned, make_plan
from vlmdefend.evaluation.launchers.listener import Failure, Listener
from vlmdefend.evaluation.store.environment import choose_device
from vlmdefend.evaluation.store.fingerprint import code_hash, house_hash
from vlmdefend.evaluation.store.records import Cell, Record, Row
from vlmdefend.evaluation.store.run_folder import Store
from vlmdefend.models import load_model
from vlmdefend.models.clip.vision_language import VisionLanguageModel

# A shard is so many batches; a kill loses the one that runs. On a GPU a batch takes seconds, and refilling the places
# of decided images keeps it busy; on a CPU it may take minutes, and a batch that shrinks costs no more per image.
SHARD_BATCHES = {"cpu": 1, "cuda": 4}


@dataclass
class Evaluation:
    """The outcome of a grid: finished records with their rows, failures, and how many were found done."""

    results: list[tuple[Record, list[Row]]] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    reused: int = 0


def evaluate(out: str | Path = "runs", **grid: Any) -> Evaluation:
    """Evaluate every combination of models, defenses, data sets, attacks, eps and seeds; the same call resumes.

    Args:
        out: the run folder.
        grid: the fields of :class:`~vlmdefend.evaluation.grid.grid.Grid`: ``model``, ``defense``, ``dataset``,
            ``attack``, ``eps`` ..., each a value, a list, or text with commas.

    Raises:
        UserError: bad input; nothing was computed. A cell that fails later is in ``failures`` instead.
    """
    return run_plan(make_plan(Grid.build({}, grid)), Store(out), Listener())


def run_plan(plan: Plan, store: Store, listener: Listener, *, debug: bool = False) -> Evaluation:
    """Compute the cells that ``store`` does not have yet.

    Args:
        debug: let a defect raise instead of recording it as the cell's failure.

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
            listener.fail(failure, sum(len(planned.images) for planned in cells), len(cells))
            continue
        for planned in cells:
            store.forget(bind(plan, planned, None, device, contents[planned.images]))
            cell = bind(plan, planned, model, device, contents[planned.images])
            try:
                _run_cell(plan, planned, model, cell, store, listener, evaluation)
            except StorageError:
                raise
            except Exception as error:
                if debug and not isinstance(error, UserError):
                    raise
                failure = _failure(cell.title(), error)
                evaluation.failures.append(failure)
                listener.fail(failure, len(planned.images))
    return evaluation


def prepare(plan: Plan) -> torch.device:
    """Set torch up for a verdict, which is computed in float32 on every device; the device."""
    if plan.grid.threads:
        torch.set_num_threads(plan.grid.threads)
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    return choose_device(plan.grid.device)


def bind(
    plan: Plan, planned: Planned, model: VisionLanguageModel | None, device: torch.device, images_hash: str = ""
) -> Cell:
    """The cell with the hashes that need the model; None: of a model that could not be loaded."""
    return Cell(
        protocol=plan.protocol.name,
        protocol_hash=plan.protocol.hash,
        model=planned.model if model is None else model.name,  # with --weights it names the file too
        weights_hash="" if model is None else _model_hash(model),
        defense=planned.defense.name,
        defense_config=planned.defense.spec() | code_hash(planned.defense),
        dataset=planned.images.name,
        split=planned.images.split,
        ids_hash=planned.images.ids_hash,
        images_hash=images_hash,
        skip_bad=plan.grid.skip_bad,
        n=len(planned.images),
        prompts_hash=VisionLanguageModel.prompts_hash(planned.images.class_names, templates_of(plan, planned)),
        attack=planned.attack.name,
        attack_config=planned.attack.spec() | code_hash(planned.attack),
        attacker=planned.attacker,
        norm=planned.norm,
        eps=planned.eps,
        seed=planned.seed,
        batch_size=plan.grid.batch_size,
        shard_size=plan.grid.batch_size * SHARD_BATCHES.get(device.type, 1),
        code_hash=house_hash(),
        device=device.type,
    )


def _run_cell(
    plan: Plan,
    planned: Planned,
    model: VisionLanguageModel,
    cell: Cell,
    store: Store,
    listener: Listener,
    evaluation: Evaluation,
) -> None:
    listener.begin(cell)
    with store.writing(cell) as writer:
        record = store.record(cell)
        reused = record is not None and record.status == "done"
        if record is not None and reused:
            rows = store.rows(record)
            listener.advance(cell, len(planned.images))
        else:
            try:
                record, rows = judge_of(plan, planned, model, cell).run(writer, listener)
            except StorageError:
                raise
            except Exception as error:
                writer.fail(_failure(cell.title(), error).message)
                raise
    evaluation.results.append((record, rows))
    evaluation.reused += reused
    listener.end(record, reused=reused)


def judge_of(plan: Plan, planned: Planned, model: VisionLanguageModel, cell: Cell) -> Judge:
    """The judge of a cell, with the classifier that the cell speaks of."""
    native = plan.protocol.pixel_space == "native"
    return Judge(
        cell=cell,
        model=model.zero_shot(
            planned.images.class_names,
            templates_of(plan, planned),
            normalization=plan.protocol.normalization,
            resize_inside=native,
        ),
        defense=planned.defense,
        attack=planned.attack,
        images=planned.images,
        transform=PixelTransform(None if native else model.image_size, model.interpolation),
        device=model.device,
        skip_bad=plan.grid.skip_bad,
        learned_prompt=model.learned_prompt,
    )


def templates_of(plan: Plan, planned: Planned) -> tuple[str, ...]:
    """The prompts that the model is asked with; one with a learned context reads that instead."""
    chosen = plan.protocol.templates
    return planned.images.templates if chosen == "dataset" else tuple(chosen)


def _model_hash(model: VisionLanguageModel) -> str:
    """A hash of the weights and how they are used: with another activation or mean they are another model."""
    used = json.dumps([model.weights_hash, model.model_cfg, model.preprocess_cfg], sort_keys=True, default=str)
    return hashlib.sha256(used.encode()).hexdigest()[:16]


def _failure(what: str, error: Exception) -> Failure:
    """One line; a defect is named by its type."""
    users = isinstance(error, UserError)
    message = " ".join(str(error).split()).removeprefix(f"{what}: ")
    return Failure(what, message if users else f"{type(error).__name__}: {message}", users)
