"""Creates the two objectives of a run from their texts and from the flags that are options of the method."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from vlmdefend.defenses.adaptation import ADAPTATIONS
from vlmdefend.defenses.adaptation.base import Adaptation, Role
from vlmdefend.errors import UserError
from vlmdefend.registry import parse_spec
from vlmdefend.training.settings.adaptation_settings import Term, UrdaSettings

ABLATED: dict[Term, str] = {
    "features": "features",
    "defense": "defense",
    "prediction": "prediction",
    "entropy-weight": "entropy_weight",
}


def adaptation_of(settings: UrdaSettings) -> Adaptation:
    """Returns the objective of step 1.

    Raises:
        UserError: no such method, or one of step 2.
    """
    return _create(settings.method, "adaptation", {})


def robustification_of(settings: UrdaSettings) -> Adaptation | None:
    """Step 2's objective; None: it is left out.

    Raises:
        UserError: no such method, one of step 1, or a part to leave out that it does not have.
    """
    if settings.robustify == "none":
        return None
    name, written = parse_spec(settings.robustify)
    cls = ADAPTATIONS.get(name)
    flags: dict[str, Any] = {"eps": settings.radius, "alpha": settings.step_size, "steps": settings.steps}
    if cls.name == "dart-urda":
        flags |= {"weight_reduction": settings.reduction, "trade_off": settings.trade_off, "space": settings.space}
        flags |= {"augment": settings.augment, **{ABLATED[term]: False for term in settings.ablate}}
    elif settings.ablate:
        raise UserError(f"--ablate: {cls.name} has no such terms; it is for dart-urda.")
    has = {f.name for f in fields(cls)} - set(written)  # type: ignore[arg-type]
    return _create(settings.robustify, "robustification", {k: v for k, v in flags.items() if k in has})


def _create(text: str, role: Role, options: dict[str, Any]) -> Adaptation:
    method: Adaptation = ADAPTATIONS.create(text, **options)
    if method.role != role:
        option = "--robustify" if method.role == "robustification" else "--method"
        raise UserError(f"{method.name} is a method of {method.role}; give it as {option} {text}.")
    return method
