"""Peak memory of each attack that has a peer, on the same batch."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torchattacks

from benchmarks.speed.fixed import Row, peak_bytes, verdict
from benchmarks.speed.labelled import Labelled, labelled
from vlmdefend.attacks import ATTACKS
from vlmdefend.types import Threat

EPS, STEPS, BATCH = 8 / 255, 10, 64
Run = Callable[[], object]


def memory() -> list[Row]:
    """A few steps suffice: no buffer grows with their number."""
    subject = labelled("undefended", 120)
    subject.images, subject.labels = subject.images[:BATCH], subject.labels[:BATCH]
    rows = []
    for name, peer, run in _pairs(subject):
        attack = ATTACKS.create(name)

        def own(attack=attack) -> object:  # type: ignore[no-untyped-def]
            return attack(subject.view(stop=False), subject.images, subject.labels, Threat(_norm(attack.name), EPS))

        ours, theirs = peak_bytes(own), peak_bytes(run)
        rows.append(
            {
                "attack": name,
                "peer": peer,
                "peak MB": f"{ours / 1e6:.1f} / {theirs / 1e6:.1f} = {ours / theirs:.2f}",
                "target": f"≤ 1: {verdict(ours <= theirs)}",
            }
        )
    return rows


def _norm(name: str) -> str:
    return "l2" if name == "cw" else "linf"


def _pairs(subject: Labelled) -> list[tuple[str, str, Run]]:
    """Ours by name with its peer; torchattacks finds parameters that want gradients, as is usual."""
    x, y, plain = subject.images, subject.labels, subject.plain.requires_grad_(True)
    given = {"eps": EPS, "steps": STEPS}
    theirs = {
        "fgsm": torchattacks.FGSM(plain, eps=EPS),
        f"pgd:steps={STEPS}": torchattacks.PGD(plain, alpha=EPS / 4, **given),
        f"mi:steps={STEPS}": torchattacks.MIFGSM(plain, alpha=EPS / 4, **given),
        f"ni:steps={STEPS}": torchattacks.NIFGSM(plain, alpha=EPS / 4, **given),
        f"di:steps={STEPS}": torchattacks.DIFGSM(plain, alpha=EPS / 4, **given),
        f"ti:steps={STEPS}": torchattacks.TIFGSM(plain, alpha=EPS / 4, **given),
        f"si:steps={STEPS}": torchattacks.SINIFGSM(plain, alpha=EPS / 4, m=5, **given),
        "cw:steps=10:searches=1": torchattacks.CW(plain, steps=10),
    }
    pairs: list[tuple[str, str, Run]] = [
        (name, f"torchattacks {type(attack).__name__}", lambda attack=attack: attack(x, y))
        for name, attack in theirs.items()
    ]
    base, fab, square = (importlib.import_module(f"pyautoattack.{m}") for m in ("autopgd_base", "fab_pt", "square"))
    for loss in ("ce", "dlr"):
        apgd = base.APGDAttack(plain, n_iter=STEPS, norm="Linf", eps=EPS, seed=0, loss=loss)
        pairs.append((f"apgd-{loss}:steps={STEPS}", "the original", lambda a=apgd: a.perturb(x, y)))
    targeted = base.APGDAttack_targeted(plain, n_iter=STEPS, norm="Linf", eps=EPS, seed=0)
    pairs.append((f"apgd-t:steps={STEPS}", "the original", lambda: targeted.perturb(x, y)))
    fab_attack = fab.FABAttack_PT(plain, n_iter=STEPS, norm="Linf", eps=EPS, seed=0, device="cpu")
    pairs.append((f"fab:steps={STEPS}", "the original", lambda: fab_attack.perturb(x, y)))
    search = square.SquareAttack(plain, n_queries=100, norm="Linf", eps=EPS, seed=0, device="cpu")
    pairs.append(("square:queries=100", "the original", lambda: search.perturb(x, y)))
    return pairs
