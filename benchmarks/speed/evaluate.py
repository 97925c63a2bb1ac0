"""A whole cell of ``vlmdefend evaluate`` with PGD-100 against torchattacks' PGD-100 on the same images."""

from __future__ import annotations

import tempfile
import time
from statistics import median

import torch
import torchattacks
from torch import Tensor

from benchmarks.speed.fixed import Row, spread, verdict
from benchmarks.speed.subjects import Wrapped, as_plain, pixels_of
from vlmdefend.data.loader import load_batch
from vlmdefend.evaluation.grid.grid import Grid
from vlmdefend.evaluation.grid.planned import Plan
from vlmdefend.evaluation.grid.protocol import get_protocol
from vlmdefend.evaluation.launchers.inline import run_plan
from vlmdefend.evaluation.make_plan import make_plan
from vlmdefend.evaluation.store.records import Cell, Record
from vlmdefend.evaluation.store.run_folder import Store
from vlmdefend.models import load_model
from vlmdefend.progress import Progress

IMAGES, STEPS, BATCH, ROUNDS = 500, 100, 64, 3
EPS = ("16/255", "8/255", "4/255")


class Clock(Progress):
    """CPU seconds from a cell's first moment, its model loaded, to its written record."""

    seconds = 0.0

    def begin(self, cell: Cell) -> None:
        """The cell starts."""
        self.started = time.process_time()

    def end(self, record: Record, *, reused: bool) -> None:
        """The cell is stored."""
        self.seconds = time.process_time() - self.started


def evaluate() -> list[Row]:
    """CPU seconds and robust accuracy of both, per eps; the two take turns.

    Ours includes decoding, the text encoder, all checks, the re-prediction and the files; theirs is the attack and
    the predictions alone.
    """
    plans = {eps: _plan(eps) for eps in EPS}
    planned = plans[EPS[0]].cells[0]
    model = load_model("tiny-vit", device="cpu")
    batch, _ = load_batch(planned.images, range(len(planned.images)), pixels_of(model), skip_bad=False)
    templates = get_protocol("unified").templates
    plain = as_plain(model, model.text_features(planned.images.class_names, tuple(templates)))
    rows = []
    for eps, plan in plans.items():
        radius, ratios, own, theirs = plan.cells[0].eps, [], [], []
        for turn in range(ROUNDS):
            for which in ("own", "theirs") if turn % 2 else ("theirs", "own"):
                if which == "own":
                    seconds, record = _own(plan)
                    own.append(seconds)
                else:
                    seconds, survivors = _theirs(plain, batch.images, batch.labels, radius)
                    theirs.append(seconds)
            ratios.append(theirs[-1] / own[-1])
        gradients = record.cost.attack_backwards / record.cost.attack_images
        met = median(ratios) >= 5 and record.robust <= survivors
        rows.append(
            {
                "eps": eps,
                "vlmdefend CPU s": spread(own, 1),
                "torchattacks CPU s": spread(theirs, 1),
                "times faster": spread(ratios, 1),
                "gradients per image": f"{gradients:.1f} vs {STEPS}",
                "robust accuracy": f"{record.robust / record.n:.3f} vs {survivors / record.n:.3f}",
                "target": f"≥ 5 times, accuracy not above: {verdict(met)}",
            }
        )
    return rows


def _plan(eps: str) -> Plan:
    flags = {"model": "tiny-vit", "dataset": "fashion", "attack": "pgd", "steps": STEPS, "eps": eps, "limit": IMAGES}
    return make_plan(Grid.build({}, {**flags, "batch_size": BATCH, "device": "cpu"}))


def _own(plan: Plan) -> tuple[float, Record]:
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        outcome = run_plan(plan, Store(folder), clock, debug=True)
    return clock.seconds, outcome.results[0][0]


def _theirs(model: Wrapped, images: Tensor, labels: Tensor, eps: float) -> tuple[float, int]:
    """Seconds and the number of images that are right before and after the attack."""
    torch.manual_seed(0)
    clock, survivors = time.process_time(), 0
    attack = torchattacks.PGD(model, eps=eps, alpha=eps / 4, steps=STEPS)
    for clean, truth in zip(torch.split(images, BATCH), torch.split(labels, BATCH), strict=True):
        adversarial = attack(clean, truth)
        with torch.no_grad():
            right = (model(clean).argmax(1) == truth) & (model(adversarial).argmax(1) == truth)
        survivors += int(right.sum())
    return time.process_time() - clock, survivors
