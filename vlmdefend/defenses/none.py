"""No defense: the bare model, the row that every table starts with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from vlmdefend.defenses import DEFENSES
from vlmdefend.defenses.base import Defense, Paradigm, Recipe
from vlmdefend.types import Pipeline


@DEFENSES.register
@dataclass(frozen=True, kw_only=True)
class NoDefense(Defense):
    """The bare model."""

    name: ClassVar[str] = "none"
    paradigm: ClassVar[Paradigm] = "none"
    summary: ClassVar[str] = "the bare model"
    citation: ClassVar[str] = "–"
    neutral: ClassVar[dict[str, Any] | None] = {}
    recipe: ClassVar[Recipe] = Recipe("exact gradient")

    def wrap(self, model: Pipeline) -> Pipeline:
        """Returns the model."""
        return model
