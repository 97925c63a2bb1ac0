"""Binds planned cells to a loaded model: the hashes of a cell, and the evaluator that computes it."""

from __future__ import annotations

import hashlib
import json

import torch

from vlmdefend.data.transforms import PixelTransform
from vlmdefend.evaluation.cell.evaluator import CellEvaluator
from vlmdefend.evaluation.grid.planned import Plan, PlannedCell
from vlmdefend.evaluation.store.environment import choose_device
from vlmdefend.evaluation.store.fingerprint import code_hash, package_hash
from vlmdefend.evaluation.store.records import Cell
from vlmdefend.models.clip.vision_language import VisionLanguageModel

# Batches per shard; a kill loses the running shard. On a GPU a batch takes seconds, and finished images are replaced by
# the next ones of the shard to keep it busy; on a CPU a batch may take minutes, and a smaller batch costs no more per
# image.
SHARD_BATCHES = {"cpu": 1, "cuda": 4}


def prepare(plan: Plan) -> torch.device:
    """Sets threads and exact float32 arithmetic in torch, and returns the device of the evaluation."""
    if plan.grid.threads:
        torch.set_num_threads(plan.grid.threads)
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    return choose_device(plan.grid.device)


def bind(
    plan: Plan, planned: PlannedCell, model: VisionLanguageModel | None, device: torch.device, images_hash: str = ""
) -> Cell:
    """Returns the cell with the hashes that need the model; ``model`` is None if it could not be loaded."""
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
        code_hash=package_hash(),
        device=device.type,
    )


def evaluator_of(plan: Plan, planned: PlannedCell, model: VisionLanguageModel, cell: Cell) -> CellEvaluator:
    """Returns the evaluator of a cell, with the zero-shot classifier of the cell's model and prompts."""
    native = plan.protocol.pixel_space == "native"
    return CellEvaluator(
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


def templates_of(plan: Plan, planned: PlannedCell) -> tuple[str, ...]:
    """Returns the prompt templates of a cell; a model with a learned context uses that instead."""
    chosen = plan.protocol.templates
    return planned.images.templates if chosen == "dataset" else tuple(chosen)


def _model_hash(model: VisionLanguageModel) -> str:
    """Returns a hash of weights, architecture and preprocessing: a change in any of them makes another model."""
    used = json.dumps([model.weights_hash, model.model_cfg, model.preprocess_cfg], sort_keys=True, default=str)
    return hashlib.sha256(used.encode()).hexdigest()[:16]
