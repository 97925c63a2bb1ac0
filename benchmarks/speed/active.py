"""What the active set saves: forwards and backwards per image against the fixed step count."""

from __future__ import annotations

from benchmarks.speed.fixed import Row
from benchmarks.speed.labelled import labelled
from vlmdefend.attacks import ATTACKS
from vlmdefend.types import Threat, format_eps

ATTACKED = (
    "fgsm", "pgd:steps=100", "mi:steps=100", "apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square:queries=1000",
    "autoattack:queries=1000",
)  # fmt: skip
CASES = (("undefended", 16 / 255), ("robust", 8 / 255))


def active() -> list[Row]:
    """What the model gets right of 40 images; the fixed count is what every image would cost without leaving."""
    rows = []
    for name in ATTACKED:
        for which, eps in CASES:
            subject = labelled(which, 40)
            attack, view = ATTACKS.create(name), subject.view()
            found = attack(view, subject.images, subject.labels, Threat("linf", eps))
            forwards, backwards = attack.budget()
            spent = view.queries.forwards.double().mean(), view.queries.backwards.double().mean()
            fixed = forwards + backwards
            rows.append(
                {
                    "attack": name,
                    "model": f"{subject.name}, {format_eps(eps)}",
                    "robust": f"{int((~found.fooled).sum())} of {len(found.fooled)}",
                    "forwards per image": f"{spent[0]:.1f} of {forwards}",
                    "backwards per image": f"{spent[1]:.1f} of {backwards}",
                    "share of the fixed count": f"{float(sum(spent)) / fixed:.3f}",
                }
            )
    return rows
