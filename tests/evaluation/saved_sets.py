"""Sets of adversarial images, crafted and scored in this process."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

import vlmdefend
from vlmdefend.data.loader import load_batch
from vlmdefend.errors import UserError
from vlmdefend.evaluation.adversarial_sets.crafting import CraftedSet, craft_set
from vlmdefend.evaluation.adversarial_sets.set_format import INDEX
from vlmdefend.evaluation.grid.grid import Grid
from vlmdefend.evaluation.make_plan import make_plan
from vlmdefend.progress import Progress

COUNT = 20
OPTIONS: dict[str, Any] = {"limit": COUNT, "batch_size": 8, "device": "cpu"}


def craft(out: Path, *, png: bool = False, ids: tuple[str, ...] = (), **options: Any) -> CraftedSet:
    """Craft in this process; ``ids`` are the names of the first images."""
    plan = make_plan(Grid.build({"eps": "8/255", "attacker": "adaptive"}, {**OPTIONS, **options}))
    if ids:
        (planned,) = plan.cells
        images = replace(planned.images, ids=(*ids, *planned.images.ids[len(ids) :]))
        plan = replace(plan, cells=[replace(planned, images=images)])
    return craft_set(plan, out, Progress(), png=png)


def score(folder: Path, out: Path, **options: Any) -> Any:
    found = vlmdefend.evaluate(out, adversarial=str(folder), batch_size=8, device="cpu", **options)
    if found.failures:
        raise UserError(found.failures[0].message)
    return found.results


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / INDEX).read_text().splitlines()]


def clean_of(crafted: CraftedSet) -> Tensor:
    return load_batch(crafted.images, range(len(crafted.images)), crafted.transform, skip_bad=False)[0].images


def photos(folder: Path) -> Path:
    images = vlmdefend.load_dataset("fashion", limit=12)
    for i, label in enumerate(images.labels):
        place = folder / images.class_names[label].replace(" ", "_") / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        images.read(i).save(place)
    return folder
