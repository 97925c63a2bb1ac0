"""Finds reasons to doubt a robust accuracy in the records and rows of one pipeline. Imports no torch.

A robust accuracy is an upper bound: a weak attack makes it too high. Each reason is a sign of a weak attack or a masked
gradient (Athalye et al. 2018; Carlini et al. 2019; Croce et al. 2022), with the numbers that show it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, NamedTuple, get_args

from vlmdefend.evaluation.statistics.paired import MATERIAL, clearly_lower, compared, percent, robust_under_all, share
from vlmdefend.evaluation.store.records import Cell, ImageRow, Record
from vlmdefend.registry import split_outside
from vlmdefend.types import Attacker, format_eps

ATTACKERS: tuple[Attacker, ...] = get_args(Attacker)
ZERO_GRADIENTS = 0.01  # a larger share of exactly-zero pixel gradients is a reason
UNMOVED = 0.5  # a larger share of survivors whose margin did not rise is a reason
GAP = 0.10  # a larger difference between PGD and AutoAttack suggests a masked gradient
# options that are printed beside an attack's name
EFFORT = ("source", "version", "plus", "kind", "learn", "target", "steps", "queries", "n_queries", "restarts")


class Result(NamedTuple):
    """A record with its per-image rows (none for a failed cell)."""

    record: Record
    rows: Sequence[ImageRow]


@dataclass(frozen=True)
class Reason:
    """One reason to doubt a number, with the radius and the attackers that it concerns.

    ``eps`` None: it concerns the pipeline at every radius. ``attackers``: the columns in doubt; empty means all.
    ``kind`` is the same for the same reason at another radius or seed.
    """

    word: Literal["MASKED?", "BUDGET!"]
    kind: str
    text: str
    eps: float | None = None
    attackers: tuple[Attacker, ...] = ()


def reasons(results: Iterable[Result]) -> list[Reason]:
    """Returns every reason to doubt the cells of one pipeline.

    Args:
        results: the cells of one protocol, model, defense, dataset, norm and seed: all attacks, attackers and radii
            together, since most reasons come from comparing them. Failed cells are skipped.
    """
    done = [r for r in results if r.record.status == "done"]
    attacked = [r for r in done if is_attacked(r.record.cell)]
    found = [*_broken_pipeline(done)]
    if any(r.record.cell.norm == "corruption" for r in attacked):
        return found  # no optimization, and a severity is no ball that contains the smaller ones
    for result in attacked:
        found += [*_outside_budget(result), *_zero_gradients(result), *_not_rising(result)]
    for eps in sorted({r.record.cell.eps for r in attacked}):
        here = [r for r in attacked if r.record.cell.eps == eps]
        found += [*_gradient_free_lower(eps, here), *_transfer_lower(eps, here), *_autoattack_lower(eps, here)]
    found += _rising_with_eps(attacked)
    return list(dict.fromkeys(found))


def is_attacked(cell: Cell) -> bool:
    """Returns False for the cell of attack ``none``, which measures clean accuracy only."""
    return cell.attack != "none"


def attack_label(cell: Cell) -> str:
    """Returns ``pgd steps=10``: the attack's name and its budget."""
    config = cell.attack_config
    nested = [split_outside(str(config[key]), "+") for key in ("attack", "attacks") if key in config]  # of a wrapper
    members = ["+".join(part.strip("[] ").partition(":")[0] for part in parts) for parts in nested]
    effort = [f"{k}={config[k]}" for k in EFFORT if _is_printed(k, config.get(k))]
    return " ".join([cell.attack, *members, *effort])


def _is_printed(option: str, value: object) -> bool:
    """Returns whether an option is set to something else than its usual value."""
    default = {"restarts": 1, "plus": "", "version": "standard"}
    return value is not None and value != default.get(option)


def _broken_pipeline(results: Sequence[Result]) -> Iterator[Reason]:
    """Yields reasons if two predictions of the same images differ, or depend on the other images of the batch."""
    if any(r.record.checks.forwards_differ and not r.record.stochastic for r in results):
        yield Reason(
            "MASKED?",
            "forwards differ",
            "two forwards of the same images differ, though the defense is declared deterministic",
        )
    if any(r.record.checks.batch_dependent for r in results):
        yield Reason(
            "MASKED?",
            "batch mates",
            "predictions change with the other images of the batch: the accuracy depends on the batch size",
        )


def _outside_budget(result: Result) -> Iterator[Reason]:
    """Yields a reason if the attack returned images outside the budget."""
    outside, images, cell = result.record.checks.outside_budget, result.record.cost.attack_images, result.record.cell
    if outside:
        of = f" of {images}" if images >= outside else ""
        yield Reason(
            "BUDGET!",
            f"outside {_who(cell)}",
            f"{_who(cell)} left the budget on {outside}{of} images; these were replaced by their clean images",
            cell.eps,
            (cell.attacker,),
        )


def _zero_gradients(result: Result) -> Iterator[Reason]:
    """Yields a reason if too many pixel gradients are zero or not finite."""
    checks, cell = result.record.checks, result.record.cell
    if result.record.gradient_free or not checks.gradient_values:
        return
    share = checks.zero_gradients / checks.gradient_values
    if share > ZERO_GRADIENTS:
        yield Reason(
            "MASKED?",
            f"zero gradients {_who(cell)}",
            f"{percent(share)} of the pixel gradients of {_who(cell)} are zero or not finite",
            cell.eps,
            (cell.attacker,),
        )


def _not_rising(result: Result) -> Iterator[Reason]:
    """Yields a reason if the attack did not raise the margin of most images that survived it.

    The margins are of the deployed pipeline. A transfer attacker optimizes the loss of the bare model, so it is skipped
    (except without a defense, where the two are the same).
    """
    checks, cell = result.record.checks, result.record.cell
    if cell.eps == 0 or not checks.attacked_survivors or (cell.attacker == "transfer" and cell.defense != "none"):
        return
    unmoved, survivors = checks.loss_not_rising, checks.attacked_survivors
    if unmoved / survivors > UNMOVED and unmoved >= MATERIAL * result.record.n:
        yield Reason(
            "MASKED?",
            f"not rising {_who(cell)}",
            f"{_who(cell)} did not raise the margin of {unmoved} of the {survivors} images that survived it",
            cell.eps,
            (cell.attacker,),
        )


def _gradient_free_lower(eps: float, results: Sequence[Result]) -> Iterator[Reason]:
    """Yields a reason if an attack without gradients leaves less accuracy than the attacks with gradients.

    The adaptive attacker may query what the white-box attacker queries: if it has no gradient-free attack, its gradient
    attacks are compared with the gradient-free attacks of the white-box attacker.
    """
    for attacker in ATTACKERS:
        own = [r for r in results if r.record.cell.attacker == attacker]
        # one perturbation for all images is weaker than queries on each image, with or without masking
        gradient = [r for r in own if not r.record.gradient_free and not r.record.set_level]
        free = [r for r in own if r.record.gradient_free]
        if attacker == "adaptive" and not free:
            free = [r for r in results if r.record.gradient_free and r.record.cell.attacker == "whitebox"]
        if not gradient:
            continue
        high = robust_under_all(gradient)
        for result in free:
            low = robust_under_all([result])
            if clearly_lower(low, high):
                label = attack_label(result.record.cell)
                yield Reason(
                    "MASKED?",
                    f"gradient-free {label} {attacker}",
                    f"{label}, which needs no gradient, leaves {compared(low, high)[0]}, below the "
                    f"{compared(low, high)[1]} of the {attacker} gradient attacks: the gradient is masked",
                    eps,
                    (attacker,),
                )


def _transfer_lower(eps: float, results: Sequence[Result]) -> Iterator[Reason]:
    """Yields a reason if transfer leaves less accuracy than white-box or adaptive, over the attacks that both ran."""
    transfer = [r for r in results if r.record.cell.attacker == "transfer" and not _crafted_here(r.record.cell)]
    attackers: tuple[Attacker, ...] = ("whitebox", "adaptive")
    for attacker in attackers:
        own = [r for r in results if r.record.cell.attacker == attacker]
        both = {_attack(r) for r in transfer} & {_attack(r) for r in own}
        low = robust_under_all([r for r in transfer if not both or _attack(r) in both])
        high = robust_under_all([r for r in own if not both or _attack(r) in both])
        if clearly_lower(low, high):
            below, above = compared(low, high)
            yield Reason(
                "MASKED?",
                f"transfer {attacker}",
                f"transfer {below} is below {attacker} {above}: the {_SPELLED[attacker]} gradient is masked",
                eps,
                (attacker,),
            )


def _autoattack_lower(eps: float, results: Sequence[Result]) -> Iterator[Reason]:
    """Yields a reason if AutoAttack leaves far less accuracy than PGD: the logit scale may mask the gradient of PGD."""
    for attacker in ATTACKERS:
        own = [r for r in results if r.record.cell.attacker == attacker]
        low, high = (
            robust_under_all([r for r in own if r.record.cell.attack == name]) for name in ("autoattack", "pgd")
        )
        shared = low.keys() & high.keys()
        gap = sum(high[i] for i in shared) - sum(low[i] for i in shared)
        if clearly_lower(low, high) and gap > GAP * len(shared):
            below, above = compared(low, high)
            yield Reason(
                "MASKED?",
                f"autoattack {attacker}",
                f"autoattack leaves {below}, more than {100 * GAP:.0f} points below the {above} of pgd {attacker}: the "
                "gradient may be masked",
                eps,
                (attacker,),
            )


def _crafted_here(cell: Cell) -> bool:
    """Returns whether saved images were crafted on the same pipeline, so that they are not a transfer attack."""
    config = cell.attack_config
    names = ("weights_hash", "defense", "defense_config")
    return cell.attack == "saved" and all(config.get(f"source_{name}") == getattr(cell, name) for name in names)


def _rising_with_eps(results: Sequence[Result]) -> Iterator[Reason]:
    """Yields reasons if accuracy rises with eps, though a larger ball contains the smaller one."""

    def attack(result: Result) -> tuple[str, str, str]:
        return (result.record.cell.attacker, *_attack(result))

    for _, same in groupby(sorted(results, key=attack), key=attack):
        cells = list(same)
        radii = sorted({r.record.cell.eps for r in cells})
        robust = {eps: robust_under_all([r for r in cells if r.record.cell.eps == eps]) for eps in radii}
        cell = cells[0].record.cell
        for position, eps in enumerate(radii):
            smaller = [e for e in radii[:position] if clearly_lower(robust[e], robust[eps])]
            if smaller:
                least = min(smaller, key=lambda e: share(robust[e]))
                below, above = compared(robust[least], robust[eps])
                yield Reason(
                    "MASKED?",
                    f"rising {_who(cell)}",
                    f"{_who(cell)} leaves {above} at {format_eps(eps)} but {below} at {format_eps(least)}: "
                    "a larger budget cannot help the defense",
                    eps,
                    (cell.attacker,),
                )


_SPELLED: dict[Attacker, str] = {"transfer": "transfer", "whitebox": "white-box", "adaptive": "adaptive"}


def _attack(result: Result) -> tuple[str, str]:
    """Returns name and options of a cell's attack, to find the same attack in other cells."""
    cell = result.record.cell
    return cell.attack, json.dumps(cell.attack_config, sort_keys=True)


def _who(cell: Cell) -> str:
    """Returns ``pgd steps=10 adaptive``: attack and attacker."""
    return f"{attack_label(cell)} {cell.attacker}"
