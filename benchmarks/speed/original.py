"""APGD, AutoAttack and Square against the authors' code on the same images."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.speed.fixed import Row, verdict
from benchmarks.speed.labelled import BATCH, Asked, Labelled, labelled
from vlmdefend.attacks import ATTACKS
from vlmdefend.attacks.base import AttackResult
from vlmdefend.attacks.gradient import _apgd
from vlmdefend.rng import opaque
from vlmdefend.types import Threat, format_eps

CASES = (("undefended", 16 / 255), ("undefended", 8 / 255), ("robust", 8 / 255))
QUERIES = 1000


def apgd() -> list[Row]:
    """apgd-ce with 100 steps on what is right of 500 images, from the same start; gradients are counted per image."""
    rows = []
    for which, eps in CASES:
        subject = labelled(which, 500)
        base = importlib.import_module("pyautoattack.autopgd_base")
        theirs, starts = Asked(subject.plain), []
        attack = base.APGDAttack(theirs, n_iter=100, norm="Linf", eps=eps, seed=0, loss="ce", n_restarts=1)
        theirs.register_forward_pre_hook(lambda _, inputs, s=starts: s.append(inputs[0].detach().clone()))

        def run(x: Tensor, y: Tensor, attack=attack, starts=starts) -> Tensor:  # type: ignore[no-untyped-def]
            before = len(starts)
            found: Tensor = attack.perturb(x, y)
            # 0: the clean prediction; 1: the start; the rest is not needed
            starts[before:] = [starts[before + 1]]
            return found

        clock = time.process_time()
        found = _in_batches(run, subject)
        seconds = time.process_time() - clock
        result, own_seconds, backwards = _own(subject, "apgd-ce", eps, torch.cat(starts))
        fooled = _fooled(subject, found)
        target = 1 / 20 if which == "undefended" and eps == 16 / 255 else 0.9
        ratio = backwards / theirs.backwards
        rows.append(
            {
                "model": subject.name,
                "eps": format_eps(eps),
                "n": str(len(subject.labels)),
                "robust, ours / theirs": f"{int((~result.fooled).sum())} / {int((~fooled).sum())}",
                "images fooled by one only": str(int((result.fooled != fooled).sum())),
                "gradients, ours / theirs": f"{backwards:,} / {theirs.backwards:,} = {ratio:.3f}",
                "CPU s": f"{own_seconds:.1f} / {seconds:.1f} = {own_seconds / seconds:.3f}",
                "target": f"same set: {verdict(bool((result.fooled == fooled).all()))}; "
                f"gradients ≤ {target:.2g}: {verdict(ratio <= target)}",
            }
        )
    return rows


def autoattack() -> list[Row]:
    """The standard version with 5,000 queries, 200 images."""
    rows = []
    for which, eps in (("undefended", 16 / 255), ("undefended", 8 / 255), ("robust", 8 / 255)):
        subject = labelled(which, 200)
        original = importlib.import_module("pyautoattack").AutoAttack(subject.plain, norm="Linf", eps=eps, seed=0)
        original.verbose = False
        clock = time.process_time()
        found = original.run_standard_evaluation(subject.images, subject.labels, batch_size=BATCH)
        seconds = time.process_time() - clock
        clock = time.process_time()
        ours = ATTACKS.create("autoattack")(subject.view(), subject.images, subject.labels, Threat("linf", eps))
        own_seconds = time.process_time() - clock
        fooled = _fooled(subject, found[0] if isinstance(found, tuple) else found)
        missed = int((fooled & ~ours.fooled).sum())
        rows.append(
            {
                "model": subject.name,
                "eps": format_eps(eps),
                "n": str(len(fooled)),
                "robust, ours / theirs": f"{int((~ours.fooled).sum())} / {int((~fooled).sum())}",
                "robust for us, broken for them": str(missed),
                "CPU s": f"{own_seconds:.1f} / {seconds:.1f} = {own_seconds / seconds:.2f}",
                "target": f"≤ 1 % such images: {verdict(missed <= 0.01 * len(fooled))}; "
                f"time ≤ 0.67: {verdict(own_seconds <= 0.67 * seconds)}",
            }
        )
    return rows


def square() -> list[Row]:
    """1,000 queries; a query is one image in a forward pass, the clean prediction left out."""
    rows = []
    for which, eps in CASES:
        subject = labelled(which, 200)
        theirs = Asked(subject.plain)
        module = importlib.import_module("pyautoattack.square")
        attack = module.SquareAttack(theirs, norm="Linf", n_queries=QUERIES, eps=eps, p_init=0.8, seed=0, device="cpu")
        clock = time.process_time()
        found = _in_batches(attack.perturb, subject)
        seconds = time.process_time() - clock
        view = subject.view()
        clock = time.process_time()
        ours = ATTACKS.create("square", queries=QUERIES)(view, subject.images, subject.labels, Threat("linf", eps))
        own_seconds = time.process_time() - clock
        fooled = _fooled(subject, found)
        speed = int(view.queries.forwards.sum()) / own_seconds / (theirs.forwards / seconds)
        rows.append(
            {
                "model": subject.name,
                "eps": format_eps(eps),
                "n": str(len(fooled)),
                "robust, ours / theirs": f"{int((~ours.fooled).sum())} / {int((~fooled).sum())}",
                "queries, ours / theirs": f"{int(view.queries.forwards.sum()):,} / {theirs.forwards:,}",
                "queries per second, ours / theirs": f"{speed:.2f}",
                "CPU s": f"{own_seconds:.1f} / {seconds:.1f} = {own_seconds / seconds:.2f}",
                "target": f"≥ 1.3: {verdict(speed >= 1.3)}",
            }
        )
    return rows


def _in_batches(run: Callable[[Tensor, Tensor], Tensor], subject: Labelled) -> Tensor:
    parts = zip(torch.split(subject.images, BATCH), torch.split(subject.labels, BATCH), strict=True)
    return torch.cat([run(x, y) for x, y in parts])


def _fooled(subject: Labelled, images: Tensor) -> Tensor:
    with torch.no_grad():
        return subject.plain(images).argmax(1) != subject.labels


def _own(subject: Labelled, name: str, eps: float, starts: Tensor) -> tuple[AttackResult, float, int]:
    """Our attack from given starting points: result, CPU seconds, gradients computed."""
    places = {opaque(image): i for i, image in enumerate(subject.ids)}
    drawn = _apgd.start_point
    _apgd.start_point = lambda x, t, rng: starts[[places[i] for i in rng.names]].clone()
    try:
        view, clock = subject.view(), time.process_time()
        result = ATTACKS.create(name)(view, subject.images, subject.labels, Threat("linf", eps))
        seconds = time.process_time() - clock
    finally:
        _apgd.start_point = drawn
    return result, seconds, int(view.queries.backwards.sum())
