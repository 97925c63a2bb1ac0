"""The matrix of saved sets and targets: the right number in the right place."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from vlmdefend.evaluation.statistics.intervals import wilson
from vlmdefend.evaluation.store.records import Cell, ImageRow, Record
from vlmdefend.reporting.tables.transfer import print_transfer

CELL: dict[str, Any] = {
    "protocol": "unified",
    "protocol_hash": "p",
    "model": "tiny-vit",
    "weights_hash": "w",
    "defense": "none",
    "defense_config": {},
    "dataset": "fashion",
    "split": "test",
    "ids_hash": "i",
    "n": 10,
    "prompts_hash": "q",
    "attack": "saved",
    "attack_config": {"source": "tiny-rn:pgd:steps=10", "set": "1f2e3d4c5b6a7988"},
    "attacker": "transfer",
    "norm": "linf",
    "eps": 4 / 255,
    "seed": 0,
    "batch_size": 64,
    "shard_size": 64,
    "device": "cpu",
}


def record(
    robust: int, clean: int = 9, *, source: str = "", digest: str = "", **fields: Any
) -> tuple[Record, list[ImageRow]]:
    config = dict(fields.pop("attack_config", CELL["attack_config"]))
    config |= {"source": source} if source else {}
    config |= {"set": digest} if digest else {}
    cell = Cell(**{**CELL, "attack_config": config, **fields})
    return Record(key=cell.key, cell=cell, status="done", n=10, clean_correct=clean, robust=robust), []


def printed(*records: tuple[Record, list[ImageRow]]) -> list[str]:
    console = Console(file=io.StringIO(), width=80, color_system=None, force_terminal=False)
    with console.capture() as capture:
        print_transfer(records, console)
    lines = [line.rstrip() for line in capture.get().splitlines()]
    assert all(len(line) <= 80 for line in lines)
    return lines


def interval(robust: int) -> str:
    low, high = wilson(robust, 10)
    return f"{10 * robust:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def test_each_set_has_its_row_and_each_target_its_column() -> None:
    numbers = {("a", "x"): 1, ("a", "y"): 7, ("b", "x"): 8, ("b", "y"): 2}
    lines = printed(*(record(k, 9 if t == "x" else 8, source=s, model=t) for (s, t), k in numbers.items()))
    assert lines[1].split()[-2:] == ["x", "y"]
    assert lines[2].split() == ["clean", "90.0", "80.0"]
    assert lines[3].startswith("a 4/255 ")
    assert " ".join(lines[3].split()).endswith(f"{interval(1)} {interval(7)}")
    assert " ".join(lines[4].split()).endswith(f"{interval(8)} {interval(2)}")
    assert len(lines) == 5


def test_a_pair_that_was_not_scored_is_a_dash() -> None:
    lines = printed(record(1, source="a", model="x"), record(2, source="b", model="y"))
    assert lines[3].split()[-1] == "-"


def test_images_that_the_set_holds_as_they_were_are_counted_below() -> None:
    config = {"source": "tiny-rn:pgd:steps=10", "set": "1f2e", "source_attacked": 7}
    lines = printed(record(1, attack_config=config), record(2, model="tiny-rn", attack_config=config))
    assert " ".join(lines[-2:]).endswith("wrong when clean, so not attacked: 3 images of tiny-rn:pgd:steps=10 4/255")
    config["source_attacked"] = 10
    assert "not attacked" not in " ".join(printed(record(1, attack_config=config)))


def test_two_sets_of_one_name_are_distinguished_by_their_hash() -> None:
    lines = printed(record(1, digest="aaaaaaaa"), record(2, digest="bbbbbbbb"))
    assert "#aaaaaa" in " ".join(lines)
    assert "#bbbbbb" in " ".join(lines)
    assert "#" not in " ".join(printed(record(1), record(2, eps=8 / 255)))


def test_targets_are_distinguished_by_defense_options_and_seed() -> None:
    jpeg = {"defense": "jpeg", "model": "m"}
    text = " ".join(
        printed(
            record(1, model="m"),
            record(2, **jpeg, defense_config={"quality": 50}),
            record(3, **jpeg, defense_config={"quality": 75}),
            record(4, model="m", seed=1),
        )
    )
    for word in ("quality=50", "quality=75", "seed 1", interval(1), interval(2), interval(3), interval(4)):
        assert word in " ".join(text.split())


def test_other_images_and_another_norm_are_another_table() -> None:
    lines = printed(record(1), record(2, dataset="mnist", ids_hash="j"), record(3, norm="l2", eps=0.5))
    assert sum(line.startswith("saved images of") for line in lines) == 3
