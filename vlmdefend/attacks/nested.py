"""Reads and writes attacks inside attacks, ``[pgd:steps=20]+square``, and passes their properties to the wrapper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlmdefend.attacks import ATTACKS
from vlmdefend.attacks.base import Attack
from vlmdefend.errors import UserError
from vlmdefend.registry import split_outside
from vlmdefend.types import NORMS, Norm


def nested_texts(text: str) -> list[str]:
    """Splits a text at the plus signs outside of brackets; drops the brackets.

    Raises:
        UserError: an empty one, or a bracket without its partner.
    """
    texts = [part.strip() for part in split_outside(text, "+")]
    texts = [part[1:-1].strip() if part.startswith("[") and part.endswith("]") else part for part in texts]
    if not all(texts):
        raise UserError(f"{text!r}: write attacks with + between them, such as [pgd:steps=20]+square.")
    return texts


def nested_attacks(given: str | Attack | Sequence[str | Attack]) -> tuple[Attack, ...]:
    """Builds attacks from their text, or returns those that are given.

    Raises:
        UserError: an unknown name or option; none at all.
    """
    if isinstance(given, Attack):
        return (given,)
    if isinstance(given, str):
        return tuple(ATTACKS.create(text) for text in nested_texts(given))
    found = tuple(attack for one in given for attack in nested_attacks(one))
    if not found:
        raise UserError("a wrapper needs at least one attack, such as attacks=pgd+square.")
    return found


def nested_attack(wrapper: str, given: str | Attack) -> Attack:
    """Builds the one attack that a wrapper takes.

    Raises:
        UserError: more than one.
    """
    found = nested_attacks(given)
    if len(found) != 1:
        raise UserError(f"{wrapper} takes one attack, not {len(found)}; put them into attack=[worst-of:attacks=...].")
    return found[0]


def text_of(attack: Attack) -> str:
    """Returns the attack with all its options as text in brackets, as :func:`nested_attacks` reads it."""
    return "[" + ":".join([attack.name, *(f"{key}={value}" for key, value in attack.spec().items())]) + "]"


def inherit_properties(wrapper: Attack, **values: Any) -> None:
    """Sets fields of a frozen wrapper: the norms that all its attacks have, and whether it needs no gradient.

    Raises:
        UserError: no norm is common to its attacks, or one changes the prompts, which are the same for all images.
    """
    for name, value in values.items():
        object.__setattr__(wrapper, name, value)
    inner = wrapper.inner
    for attack in inner:
        if attack.changes_prompts:
            raise UserError(
                f"{wrapper.name}: attack {attack.name} changes the prompts, and what it finds counts only under these; "
                "run it by itself."
            )
    norms: tuple[Norm, ...] = tuple(norm for norm in NORMS if all(norm in attack.norms for attack in inner))
    if not norms:
        known = "; ".join(f"{attack.name}: {', '.join(attack.norms)}" for attack in inner)
        raise UserError(f"{wrapper.name}: its attacks have no norm in common ({known}).")
    object.__setattr__(wrapper, "norms", norms)
    object.__setattr__(wrapper, "gradient_free", all(attack.gradient_free for attack in inner))
