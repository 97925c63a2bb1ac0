from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from vlmdefend.evaluation.statistics.diagnostics import Result
from vlmdefend.evaluation.store.records import Cell, Cost, ImageRow, Record

Make = Callable[..., Result]

DEFAULTS: dict[str, Any] = {
    "protocol": "unified",
    "protocol_hash": "p",
    "model": "tiny-vit",
    "weights_hash": "w",
    "defense": "ttc",
    "defense_config": {},
    "dataset": "fashion",
    "split": "test",
    "ids_hash": "i",
    "prompts_hash": "t",
    "attack": "pgd",
    "attack_config": {"steps": 10},
    "attacker": "whitebox",
    "norm": "linf",
    "eps": 4 / 255,
    "seed": 0,
    "batch_size": 8,
    "shard_size": 16,
    "device": "cpu",
}


def make_cell(
    robust: Iterable[int] = (), clean: Iterable[int] | None = None, ids: Iterable[int] = range(10), **fields: Any
) -> Result:
    """A cell over the images ``ids``: right on ``clean`` (all by default), still right on ``robust``."""
    names = [str(i) for i in ids]
    right = set(names if clean is None else map(str, clean))
    alive = {str(i) for i in robust} & right
    record_fields = {k: fields.pop(k) for k in list(fields) if k in Record.model_fields and k not in Cell.model_fields}
    cell = Cell(**{**DEFAULTS, "n": len(names), **fields})
    rows = [
        ImageRow(
            id=name,
            label=0,
            clean_prediction=0 if name in right else 1,
            clean_margin=-1.0 if name in right else 1.0,
            adversarial_prediction=0 if name in alive else 1,
            adversarial_margin=-0.5 if name in alive else 1.0,
            distance=cell.eps,
            steps=10,
        )
        for name in names
    ]
    values: dict[str, Any] = {
        "status": "done",
        "n": len(rows),
        "clean_correct": len(right),
        "robust": len(alive),
        "adaptive_equals_whitebox": cell.defense == "none",
        "paradigm": "none" if cell.defense == "none" else "training-free",
        "cost": Cost(
            clean_images=len(rows),
            clean_forwards=3 * len(rows),
            clean_backwards=2 * len(rows),
            clean_seconds=0.05 * len(rows),
            attack_images=len(right),
            attack_forwards=11 * len(right),
            attack_backwards=10 * len(right),
            attack_seconds=0.5 * len(right),
            peak_memory_mb=512.0,
        ),
    }
    if record_fields.get("status") == "error":
        return Result(Record(key=cell.key, cell=cell, **record_fields), ())
    return Result(Record(key=cell.key, cell=cell, **{**values, **record_fields}), rows)


@pytest.fixture
def make() -> Make:
    return make_cell


@pytest.fixture
def grid() -> list[Result]:
    """What ``evaluate`` leaves for two defenses at two radii, one of them masked, and a failed cell."""
    cells = []
    for eps in (1 / 255, 4 / 255):
        lost = 20 if eps > 0.01 else 0
        cells += [
            make_cell(range(50 - lost), range(90), range(100), defense="none", eps=eps),
            make_cell(range(70 - lost), range(88), range(100), attacker="transfer", eps=eps),
            make_cell(range(80 - lost), range(88), range(100), eps=eps),
            make_cell(range(30 - lost, 70 - lost), range(88), range(100), attacker="adaptive", eps=eps),
            make_cell(range(60 - lost), range(89), range(100), defense="jpeg", attacker="transfer", eps=eps),
            make_cell(range(55 - lost), range(89), range(100), defense="jpeg", eps=eps),
        ]
    cells.append(
        make_cell(
            (),
            ids=range(100),
            defense="jpeg",
            attacker="adaptive",
            eps=4 / 255,
            status="error",
            error="ValueError: the surrogate\nreturned no gradient",
        )
    )
    return cells


@pytest.fixture
def write() -> Callable[[Path, Iterable[Result]], Path]:
    """Write results as a run folder."""

    def write_run(folder: Path, results: Iterable[Result]) -> Path:
        for record, rows in results:
            cell = folder / "cells" / record.key
            cell.mkdir(parents=True)
            (cell / "record.json").write_text(record.model_dump_json(indent=1) + "\n")
            if record.status == "done":
                (cell / "rows.jsonl").write_text("".join(row.model_dump_json() + "\n" for row in rows))
        return folder

    return write_run
