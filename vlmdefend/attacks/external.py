"""Attacks of the package torchattacks as ``torchattacks:NAME``, with its known faults guarded: a second opinion.

What their code does that ours does not, and what holds here in spite of it:

* it may use the global random state, train and eval flags, and ``backward()``: here it sees an adapter, which has no
  parameter of the model and takes the gradient of the pixels only, inside a copy of the random state that is seeded
  from the first image's stream. What an image gets still depends on its batch mates.
* results may lie outside the ball: minimal-norm attacks (no ``eps``) are projected here, others by the contract, which
  counts them; every result is predicted again.
* ``CW`` is void where logits are negative: it is shown logits less the image's lowest.
* ``AutoAttack`` there is not AutoAttack: its members run 10 steps, not 100; ``attacks/autoattack.py`` is the real one.
* targets: 9 at most, as in the papers (theirs: all but one class). Step sizes do not follow eps: give ``alpha``.
* they return last iterates, run all steps on every image, and NI, MI and DI stand still after one zero gradient.
"""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlmdefend.attacks.base import Attack
from vlmdefend.attacks.view import View, chunks
from vlmdefend.errors import UserError, did_you_mean
from vlmdefend.rng import ImageRng
from vlmdefend.types import Norm, Threat, parse_eps

FAMILY = "torchattacks"
LINF = [
    *("FGSM", "BIM", "RFGSM", "FFGSM", "PGD", "EOTPGD", "PGDRS", "TPGD", "UPGD", "Jitter", "SPSA"),
    *("MIFGSM", "NIFGSM", "DIFGSM", "TIFGSM", "SINIFGSM", "VMIFGSM", "VNIFGSM", "PIFGSM", "PIFGSMPP"),
]
L2 = ["CW", "PGDL2", "PGDRSL2", "DeepFool", "EADEN"]
BOTH = ["APGD", "APGDT", "FAB", "Square", "AutoAttack"]
OTHER_NORMS = {"EADL1": "L1", "SparseFool": "L0", "OnePixel": "L0", "Pixle": "L0", "JSMA": "L0"}
TARGETS = 9
CLASSES_NEEDED = {"APGDT": 4, "AutoAttack": 4}  # by the denominator of the difference of logits ratio
RADII = ("eps", "max_epsilon")
FROM_VIEW = frozenset({*RADII, "model", "norm", "seed", "n_classes", "verbose"})  # not the user's to choose
# options that multiply what an attack spends, for ``--dry-run``
STEPS = ("steps", "num_iter_set", "max_iterations", "nb_iter", "n_queries")
REPEATS = ("n_restarts", "eot_iter", "m", "N", "binary_search_steps", "nb_sample", "noise_batch_size")


def create(name: str, options: Mapping[str, Any]) -> External:
    """Builds ``torchattacks:NAME:option=value`` for the registry."""
    return External(attack=name, options=tuple(options.items()))


def names() -> list[str]:
    """Returns the names of the torchattacks attacks with an L_inf or L2 budget."""
    return sorted(LINF + L2 + BOTH)


@dataclass(frozen=True, kw_only=True)
class External(Attack):
    """An attack of torchattacks (Kim 2020) by its class name there, with that class's own options.

    Radius, norm, seed and number of classes come from the threat and the view. A detector of the pipeline is ignored.

    Options:
        attack: the class name, ``CW``.
        options: its options, as pairs; those left out have its defaults. Numbers may be written as ``1/255``.

    Raises:
        UserError: torchattacks is not installed; an unknown class or option, a class whose norm is not ours; fewer
            classes than its loss needs, when it attacks.
    """

    name: ClassVar[str] = FAMILY
    summary: ClassVar[str] = "an attack of the package torchattacks, as torchattacks:NAME"
    citation: ClassVar[str] = "Kim 2020"
    attack: str
    options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        attack = _spelled(self.attack)
        known = _options_of(_class_of(attack))
        chosen = dict(known)
        for key, value in self.options:
            if key not in known:
                raise did_you_mean(f"option of {FAMILY}:{attack}", key, sorted(known) or ["none"])
            where = f"{FAMILY}:{attack}:{key}"
            in_pixels = key == "alpha" and attack in LINF and isinstance(value, str)
            chosen[key] = parse_eps(value, option=where) if in_pixels else _coerced(where, value, known[key])
        norms: tuple[Norm, ...] = ("linf", "l2") if attack in BOTH else ("linf",) if attack in LINF else ("l2",)
        values = {
            "attack": attack,
            "options": tuple(sorted(chosen.items())),
            "name": f"{FAMILY}:{attack}",
            "norms": norms,
            "gradient_free": attack in ("Square", "SPSA"),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def spec(self) -> dict[str, Any]:
        """All options of the class; its name is in :attr:`name`."""
        return dict(self.options)

    def budget(self, samples: int = 1) -> tuple[int, int]:
        """Returns an estimate of the queries: the product of the options that are counts."""
        if self.attack == "AutoAttack":
            return 5400 * samples, 200 * samples  # as it is by default: 10 steps, 9 targets, 5,000 queries
        steps = math.prod(max(int(self.spec().get(name, 1)), 1) for name in (*STEPS, *REPEATS))
        steps *= TARGETS if self.attack in ("APGDT", "FAB", "DeepFool") else 1
        return (steps + 2) * samples, 0 if self.gradient_free else (steps + 1) * samples

    def perturb(self, view: View, images: Tensor, labels: Tensor, threat: Threat, rng: ImageRng) -> Tensor:
        """Attacks ``view.width`` images at a time; images of different radius separately, since torchattacks takes one
        number.
        """
        needed = 3 if self.spec().get("loss") == "dlr" else CLASSES_NEEDED.get(self.attack, 2)
        if view.num_classes < needed:
            raise UserError(f"{self.name} needs {needed} classes, the model has {view.num_classes}.")
        result = images.clone()
        radii = threat.eps.tolist() if isinstance(threat.eps, Tensor) else [threat.eps] * len(images)
        for eps in sorted(set(radii)):
            alike = torch.tensor([place for place, radius in enumerate(radii) if radius == eps])
            for chunk in chunks(len(alike), view.width):
                index = alike[chunk]
                seed = int(rng.select(index[:1]).integers((1,), 0, 2**31 - 1))
                ball = Threat(threat.norm, eps)
                result[index] = self._run(view.select(index), images[index], labels[index], ball, seed)
        return result

    def _run(self, view: View, images: Tensor, labels: Tensor, threat: Threat, seed: int) -> Tensor:
        cls = _class_of(self.attack)
        takes = inspect.signature(cls.__init__).parameters
        ours = {
            **dict.fromkeys(RADII, threat.eps),
            "norm": "Linf" if threat.norm == "linf" else "L2",
            "seed": seed,
            "n_classes": min(view.num_classes, TARGETS + 1),
            "verbose": False,
        }
        model = _Logits(view, images.device, positive=self.attack == "CW")
        with _own_randomness(seed, images.device), torch.enable_grad():
            theirs = cls(model, **self.spec(), **{key: value for key, value in ours.items() if key in takes})
            found: Tensor = theirs(images.clone(), labels.clone()).detach().to(images)
        return found if any(radius in takes for radius in RADII) else threat.project(found, images)


class _Logits(nn.Module):
    """A module that returns the view's logits, as torchattacks expects; it holds no parameter of the model."""

    def __init__(self, view: View, device: torch.device, *, positive: bool) -> None:
        super().__init__()
        self.anchor = nn.Parameter(
            torch.zeros((), device=device), requires_grad=False
        )  # torchattacks reads the device from it
        self.hidden, self.positive = _HiddenView(view), positive

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = _PixelsOnly.apply(images, self.hidden)  # type: ignore[no-untyped-call]
        return logits - logits.detach().amin(dim=1, keepdim=True) if self.positive else logits


class _HiddenView:
    """Hides the view from ``nn.Module``, which would register the model in it as a child."""

    def __init__(self, view: View) -> None:
        self.view = view


class _PixelsOnly(torch.autograd.Function):
    """Logits whose ``backward()`` reaches the pixels and no parameter, and is counted."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, hidden: _HiddenView) -> Tensor:
        ctx.hidden = hidden
        if not images.requires_grad:
            with torch.no_grad():
                return hidden.view.logits(images)
        with torch.enable_grad():
            ctx.pixels = images.detach().requires_grad_(True)
            ctx.logits = hidden.view.logits(ctx.pixels)
        values: Tensor = ctx.logits.detach()
        return values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        found = None
        if ctx.logits.requires_grad:
            found = torch.autograd.grad(ctx.logits, ctx.pixels, gradients[0], retain_graph=True, allow_unused=True)[0]
        found = torch.zeros_like(ctx.pixels) if found is None else found
        ctx.hidden.view.count_backwards(found)
        return found, None


@contextmanager
def _own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds all global generators that torchattacks may use, and restores the caller's states afterwards."""
    import numpy

    python, legacy = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        random.seed(seed)
        numpy.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(legacy)


def _spelled(name: str) -> str:
    """The name as torchattacks spells it."""
    by_lower = {known.lower(): known for known in names()}
    norm = {known.lower(): norm for known, norm in OTHER_NORMS.items()}.get(name.lower())
    if norm is not None:
        raise UserError(f"attack {FAMILY}:{name} is one in {norm}, not in linf or l2; known: {', '.join(names())}.")
    if name.lower() not in by_lower:
        raise did_you_mean(f"attack of {FAMILY}", name, names(), hint=f"Known: {', '.join(names())}.")
    return by_lower[name.lower()]


def _class_of(name: str) -> type[Any]:
    try:
        import torchattacks
    except ImportError as error:
        raise UserError(f"attack {FAMILY}:{name} cannot be loaded ({error}); pip install torchattacks.") from error
    found: type[Any] = getattr(torchattacks, name)
    return found


def _options_of(cls: type[Any]) -> dict[str, Any]:
    """The options that are the user's, with their defaults."""
    parameters = inspect.signature(cls.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty and p.name not in FROM_VIEW}


def _coerced(where: str, value: Any, default: Any) -> Any:
    """A written value in the type of the default; a number may be a fraction."""
    if not isinstance(value, str) or isinstance(default, str):
        return value
    try:
        if isinstance(default, bool):
            return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[value.lower()]
        return int(value) if value.strip("+-").isdigit() else float(Fraction(value.replace(" ", "")))
    except (KeyError, ValueError, ZeroDivisionError):
        kind = "yes or no" if isinstance(default, bool) else "a number such as 10 or 1/255"
        raise UserError(f"{where}={value!r} is not {kind}.") from None
