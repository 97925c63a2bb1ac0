"""Number types of options with their ranges, each with its own refusal."""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import AfterValidator, ValidationInfo

from vlmdefend.errors import UserError

Number = TypeVar("Number", int, float)


def option(name: str) -> str:
    """Returns a setting's name as it is written on the command line."""
    return name.replace("_", "-").replace("templates", "template")


def _at_least_one(value: int, info: ValidationInfo) -> int:
    return value if value >= 1 else _refuse(value, info, "must be at least 1")


def _not_negative(value: Number, info: ValidationInfo) -> Number:
    return value if value >= 0 else _refuse(value, info, "must be zero or more")


def _positive(value: float, info: ValidationInfo) -> float:
    return value if value > 0 else _refuse(value, info, "must be above zero; give such a number, or leave it out")


def _share(value: float, info: ValidationInfo) -> float:
    return value if 0 <= value <= 1 else _refuse(value, info, "must lie between 0 and 1")


def _seed(value: int, info: ValidationInfo) -> int:
    return value if 0 <= value < 2**32 else _refuse(value, info, "must be a whole number from 0 to 4294967295")


def _refuse(value: Number, info: ValidationInfo, why: str) -> Number:
    raise UserError(f"--{option(info.field_name or '')} {value}: {why}.")


AtLeastOne = Annotated[int, AfterValidator(_at_least_one)]
Count = Annotated[int, AfterValidator(_not_negative)]
NotNegative = Annotated[float, AfterValidator(_not_negative)]
Positive = Annotated[float, AfterValidator(_positive)]
Seed = Annotated[int, AfterValidator(_seed)]
Share = Annotated[float, AfterValidator(_share)]
