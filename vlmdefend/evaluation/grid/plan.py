"""Turns a grid of options into planned cells: checks names, merges equal attackers, loads no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vlmdefend.attacks import ATTACKS
from vlmdefend.attacks.base import Attack
from vlmdefend.data import load_dataset
from vlmdefend.data.base import ImageSet
from vlmdefend.defenses.base import Defense
from vlmdefend.defenses.composed import create_defense
from vlmdefend.errors import UserError
from vlmdefend.evaluation.grid.grid import Grid, read_class_names
from vlmdefend.evaluation.grid.planned import Plan, PlannedCell, check_templates
from vlmdefend.evaluation.grid.protocol import Protocol, get_protocol
from vlmdefend.evaluation.store.environment import choose_device
from vlmdefend.evaluation.store.fingerprint import check_files
from vlmdefend.types import Attacker, Norm, parse_eps

# for norms that no protocol has an eps list for
DEFAULT_EPS: dict[Norm, tuple[str, ...]] = {"patch": ("0.05",), "corruption": ("1", "3", "5"), "tokens": ("1", "2")}


def plan_attacks(grid: Grid) -> Plan:
    """Checks every name and value of the grid and returns one planned cell per combination.

    Raises:
        UserError: an unknown name, an eps out of range, a data set that is not there: before anything is computed.
    """
    from vlmdefend.models.names import check_name

    choose_device(grid.device)
    protocol = get_protocol(grid.protocol)
    if grid.templates is not None:
        chosen = grid.templates if grid.templates == "dataset" else tuple(grid.templates)
        protocol = protocol.with_templates(check_templates(chosen))
    for name in grid.model:
        check_name(name, weights=grid.weights)
    defenses = [create_defense(text) for text in grid.defense]
    attacks = [_create_attack(text, grid.steps) for text in grid.attack]
    named: list[Defense | Attack] = [*defenses, *attacks]
    for method in named:
        check_files(method)
    norms = {attack: _norm_of(attack, grid.norm, protocol) for attack in attacks}
    if grid.eps:
        _refuse_several_norms({norm: attack.name for attack, norm in norms.items() if attack.name != "none"}, grid.eps)
    typed = {norm: [parse_eps(text, norm) for text in grid.eps or ()] for norm in dict.fromkeys(norms.values())}
    classes = None if grid.classes is None else read_class_names(grid.classes)
    limit = None if grid.full else grid.limit or protocol.limit
    sets = [load_dataset(name, grid.split, limit=limit, root=grid.root, classes=classes) for name in grid.dataset]
    cells = [
        PlannedCell(model, images, defense, attack, attacker, norms[attack], eps, seed)
        for model in grid.model
        for images in sets
        for defense in defenses
        for attack in attacks
        for eps in (
            [0.0] if attack.name == "none" else typed[norms[attack]] or _default_eps(protocol, images, norms[attack])
        )
        for attacker in attackers_of(defense, attack, grid.attacker)
        for seed in grid.seed
    ]
    return Plan(grid, protocol, list(dict.fromkeys(cells)))


def attackers_of(defense: Defense, attack: Attack, chosen: list[Attacker]) -> list[Attacker]:
    """Returns the attackers that differ: one without a defense; adaptive is white-box where the gradient is exact."""
    if attack.blind or defense.name == "none":
        return ["whitebox"]
    if not defense.adaptive_equals_whitebox:
        return chosen
    return list(dict.fromkeys("whitebox" if name == "adaptive" else name for name in chosen))


def _norm_of(attack: Attack, given: Norm | None, protocol: Protocol) -> Norm:
    """Returns the given norm, else the protocol's, else the first that the attack supports."""
    norm = given or (protocol.norm if protocol.norm in attack.norms else attack.norms[0])
    if norm not in attack.norms:
        raise UserError(f"attack {attack.name} is defined for {', '.join(attack.norms)}, not for {norm}.")
    return norm


def _refuse_several_norms(attacks: Mapping[Norm, str], eps: Sequence[str]) -> None:
    """Raises an error if one eps would apply to attacks of several norms: 4/255 is strong in linf and weak in l2."""
    if len(attacks) > 1:
        pairs = ", ".join(f"{norm} for {name}" for norm, name in attacks.items())
        raise UserError(
            f"--eps {','.join(map(str, eps))}: means another budget in each norm ({pairs}); run the attacks of each "
            "norm with their own --eps."
        )


def _create_attack(text: str, steps: int | None) -> Attack:
    """Creates an attack, with ``--steps`` where it takes steps and its text does not set them.

    Raises:
        UserError: attacks inside of this one take steps, and their number is not given.
    """
    from vlmdefend.registry import parse_spec

    attack = ATTACKS.create(text)
    if steps is not None and "steps=" not in text and any("steps" in inner.spec() for inner in attack.inner):
        raise UserError(
            f"--steps {steps}: does not apply to the attacks inside of {attack.name}; write it there, for example "
            f"[pgd:steps={steps}]."
        )
    if steps is None or "steps" not in attack.spec() or "steps" in parse_spec(text)[1]:
        return attack
    return ATTACKS.create(text, steps=steps)


def _default_eps(protocol: Protocol, images: ImageSet, norm: Norm) -> list[float]:
    """Returns the radii used without ``--eps``: the protocol's, which may have its own list for embedded sets."""
    from vlmdefend.data.open import listed_datasets

    if norm in DEFAULT_EPS:
        return [parse_eps(text, norm) for text in DEFAULT_EPS[norm]]
    if norm != protocol.norm:
        raise UserError(f"protocol {protocol.name} has no eps list for {norm}; give --eps, for example --eps 0.5.")
    embedded = {line.name for line in listed_datasets() if line.where == "embedded"}
    chosen = protocol.eps_embedded if protocol.eps_embedded and images.name in embedded else protocol.eps
    return [parse_eps(text, norm) for text in chosen]
