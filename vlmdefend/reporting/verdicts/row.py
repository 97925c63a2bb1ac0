"""One row of a verdict table: the scored pipeline, its accuracies, and the reasons to doubt them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vlmdefend.evaluation.statistics.diagnostics import Reason
from vlmdefend.evaluation.statistics.intervals import mean_and_spread, wilson
from vlmdefend.evaluation.store.records import Cell
from vlmdefend.reporting.verdicts.cost import PerImage
from vlmdefend.types import Attacker


@dataclass(frozen=True)
class Proportion:
    """A proportion of n images, for one seed or several."""

    counts: tuple[int, ...]
    ns: tuple[int, ...]

    @property
    def value(self) -> float:
        """The mean over seeds, 0..1."""
        return mean_and_spread(self._values())[0]

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds; None for one seed."""
        return mean_and_spread(self._values())[1]

    @property
    def interval(self) -> tuple[float, float] | None:
        """Wilson 95 % interval; None for several seeds, which share their images and so are not independent."""
        return wilson(self.counts[0], self.ns[0]) if len(self.counts) == 1 else None

    def _values(self) -> list[float]:
        return [count / n for count, n in zip(self.counts, self.ns, strict=True)]


@dataclass(frozen=True)
class ScoredPipeline:
    """The scored pipeline and its images: the fields that two cells must share for their rows to be combined."""

    protocol: str
    protocol_hash: str
    model: str
    weights_hash: str
    dataset: str
    split: str
    ids_hash: str
    prompts_hash: str
    defense: str
    defense_config: str  # JSON with sorted keys

    @classmethod
    def of(cls, cell: Cell) -> ScoredPipeline:
        """Returns the pipeline of a cell."""
        same = {name: getattr(cell, name) for name in cls.__dataclass_fields__ if name != "defense_config"}
        return cls(**same, defense_config=json.dumps(cell.defense_config, sort_keys=True))

    @property
    def place(self) -> tuple[str, ...]:
        """All fields but the defense: pipelines with the same ones are in one table."""
        same = (self.protocol, self.protocol_hash, self.model, self.weights_hash)
        return (*same, self.dataset, self.split, self.ids_hash, self.prompts_hash)

    @property
    def is_bare(self) -> bool:
        """True without a defense: then the three attackers are the same."""
        return self.defense == "none"


@dataclass(frozen=True, eq=False)
class VerdictRow:
    """The verdict on one pipeline at one radius, for one seed or merged over several."""

    pipeline: ScoredPipeline
    norm: str
    eps: float
    seeds: tuple[int, ...]
    paradigm: str = ""
    stochastic: bool = False
    n: int = 0
    skipped: int = 0
    clean: Proportion | None = None  # None: every cell failed
    robust: Mapping[Attacker, Proportion] = field(default_factory=dict)  # attackers that were run
    worst: Proportion | None = None  # None: nothing was attacked
    same_as_whitebox: tuple[Attacker, ...] = ()  # not run, because equal to white-box
    certified: Mapping[float, float] = field(default_factory=dict)  # L2 radius -> accuracy, where the defense certifies
    abstained: float = 0.0  # share of clean images on which the defense abstains
    attacks: Mapping[Attacker, tuple[str, ...]] = field(default_factory=dict)
    reasons: tuple[Reason, ...] = ()
    notes: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()
    batch_sizes: tuple[int, ...] = ()
    devices: tuple[str, ...] = ()
    cost: PerImage = field(default_factory=PerImage)

    @property
    def clean_only(self) -> bool:
        """True if only attack ``none`` was run."""
        return self.clean is not None and self.worst is None and not self.errors

    @property
    def attack_set(self) -> tuple[str, ...]:
        """Labels of all attacks, each once."""
        return tuple(dict.fromkeys(label for labels in self.attacks.values() for label in labels))

    @property
    def flags(self) -> tuple[str, ...]:
        """``MASKED?``, ``BUDGET!``, ``ERROR``: each at most once."""
        return tuple(dict.fromkeys([*(r.word for r in self.reasons), *(["ERROR"] if self.errors else [])]))

    @property
    def covered(self) -> frozenset[Attacker]:
        """The attackers that ``worst`` includes."""
        return frozenset(self.robust) | frozenset(self.same_as_whitebox)

    @property
    def order(self) -> tuple[Any, ...]:
        """The sort key of a row: by table, no defense before the defenses, radii ascending."""
        p = self.pipeline
        return (*p.place, self.norm, not p.is_bare, p.defense, p.defense_config, self.eps, self.seeds)
