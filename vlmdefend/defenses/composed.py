"""Several defenses around one model, ``ttc+jpeg``; and the creation of any defense from its text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any, cast

from vlmdefend.defenses import DEFENSES
from vlmdefend.defenses.base import Defense, Recipe
from vlmdefend.defenses.training_time import OBJECTIVES
from vlmdefend.errors import UnknownName, UserError
from vlmdefend.registry import parse_spec, split_outside
from vlmdefend.types import Pipeline


def create_defense(text: str) -> Defense:
    """Builds ``name:option=value``, or several of them with + between, in the order in which the image meets them.

    Raises:
        UserError: an unknown name or option, or defenses that do not go together.
    """
    texts = [part.strip() for part in split_outside(text, "+")]
    if len(texts) == 1:
        return _create(text)
    if not all(texts):
        raise UserError(f"defense {text!r}: a + has nothing beside it; write it between two defenses, ttc+jpeg.")
    return compose(tuple(_create(part) for part in texts))


def _create(text: str) -> Defense:
    """Builds one defense; for the name of a training method the error names the command that trains it."""
    try:
        return DEFENSES.create(text)
    except UnknownName:
        name = parse_spec(text)[0].strip().lower().replace("_", "-")
        if name not in OBJECTIVES.names():
            raise
        command = f"train --method {name}" if OBJECTIVES.get(name).schedule else "distill --proxy P --target T"
        raise UnknownName(
            f"unknown defense {name!r}; it is trained into a model: `vlmdefend {command} --out FOLDER`, then evaluate "
            "--model local-dir:FOLDER."
        ) from None


@dataclass(frozen=True, kw_only=True)
class Composed(Defense):
    """``first+second``: the image meets the first, and what that makes of it meets the second around the model.

    A defense that follows the model's gradient itself (a counter-attack) looks through the surrogates of those behind
    it: they have the same values, and the deployed ones may have no gradient. The adaptive attacker tries every
    surrogate of each with every one of the others, best per image; a gradient averages as many draws as the defense
    that
    needs most, since each draw is anew for all of them. The detector is that of the first defense that has one.

    Made by :func:`compose`, which gives every combination a class of its own for its class attributes.

    Options:
        parts: at least two defenses, the outermost first.
    """

    parts: tuple[Defense, ...]

    def wrap(self, model: Pipeline) -> Pipeline:
        """Wraps the last defense around the model, each earlier one around the result."""
        deployed, behind = model, model
        for part in reversed(self.parts):
            deployed = part.wrap(behind if part.follows_gradient else deployed)
            behind = part.surrogate(behind)
        return deployed

    def surrogate(self, model: Pipeline) -> Pipeline:
        """Returns the first surrogate of each, composed."""
        for part in reversed(self.parts):
            model = part.surrogate(model)
        return model

    def surrogates(self, model: Pipeline) -> tuple[Pipeline, ...]:
        """Returns every surrogate of each around every one of those behind it."""
        found: tuple[Pipeline, ...] = (model,)
        for part in reversed(self.parts):
            found = tuple(outer for inner in found for outer in part.surrogates(inner))
        return found

    @property
    def adaptive_equals_whitebox(self) -> bool:
        """True if it holds for all parts."""
        return all(part.adaptive_equals_whitebox for part in self.parts)

    @property
    def inner(self) -> tuple[Defense, ...]:
        """The defenses that are composed, outermost first."""
        return self.parts

    def spec(self) -> dict[str, Any]:
        """Returns every part's options under its name."""
        return {f"{part.name}.{option}": value for part in self.parts for option, value in part.spec().items()}


def compose(parts: tuple[Defense, ...]) -> Defense:
    """Returns the defense made of ``parts``, the outermost first; equal parts give an equal defense.

    Raises:
        UserError: ``none`` or the same defense twice among them; a certificate or a reject option behind another
            defense, where neither would be about the image that came in.
    """
    names = [part.name for part in parts]
    together = "+".join(names)
    if "none" in names or len(set(names)) < len(names):
        raise UserError(f"defense {together}: give each defense once, and leave out none, which does nothing.")
    for part in parts[1:]:
        if part.certifies or part.rejects:
            raise UserError(
                f"defense {together}: {part.name} scores the image that it is given; write it first, "
                f"{'+'.join([part.name, *(name for name in names if name != part.name)])}."
            )
    return cast(Callable[..., Defense], _class_of(parts))(parts=parts)


@cache
def _class_of(parts: tuple[Defense, ...]) -> type[Composed]:
    def distinct(words: list[str]) -> str:
        return ", ".join(dict.fromkeys(words))

    surrogates = prod(part.recipe.surrogates for part in parts)
    texts = [f"{part.name}: {part.recipe.text}" for part in parts]
    test_time = any(part.paradigm == "test-time adaptation" for part in parts)
    attributes = {
        "name": "+".join(part.name for part in parts),
        "paradigm": "test-time adaptation" if test_time else "training-free",
        "summary": ", then ".join(part.summary for part in parts),
        "citation": distinct([part.citation for part in parts]),
        "changes": distinct([part.changes for part in parts]),
        "rejects": parts[0].rejects,
        "certifies": parts[0].certifies,
        "follows_gradient": any(part.follows_gradient for part in parts),
        "stochastic": any(part.stochastic for part in parts),
        "recipe": Recipe(
            "; ".join(texts) + ("; every surrogate of one with every one of the others" if surrogates > 1 else ""),
            samples=max(part.recipe.samples for part in parts),
            detector_weights=next((p.recipe.detector_weights for p in parts if p.recipe.detector_weights), ()),
            surrogates=surrogates,
            bare=any(part.recipe.bare for part in parts),
        ),
    }
    return cast(type[Composed], type("Composed", (Composed,), attributes | {"__module__": __name__}))
