"""The tables of ``urda.py``: methods of both steps on the embedded domains, DART's parts, and the cost of its step."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from vlmdefend.defenses.adaptation import ADAPTATIONS
from vlmdefend.defenses.adaptation.base import UNKNOWN
from vlmdefend.defenses.adaptation.dart_urda import DartUrda
from vlmdefend.errors import UserError
from vlmdefend.evaluation.statistics.intervals import wilson
from vlmdefend.models.backbone_names import load_backbone
from vlmdefend.models.classifier.classifier import ClassifierModel, ImageClassifier
from vlmdefend.progress import Progress
from vlmdefend.rng import ImageRng
from vlmdefend.training.adaptation.job import AdaptationJob, Adapted
from vlmdefend.training.adaptation.measure import TargetNumbers
from vlmdefend.training.adaptation.student import AdaptedStudent, copy_of
from vlmdefend.training.adaptation.teacher import as_teacher
from vlmdefend.training.loop.processes import Processes
from vlmdefend.training.loop.results import HitCount
from vlmdefend.training.loop.stage import Optimization
from vlmdefend.training.loop.update import Accumulator, make_optimizer, update
from vlmdefend.training.settings.adaptation_settings import make_urda_settings
from vlmdefend.types import Batch

Row = dict[str, str]
Pairs = list[tuple[str, str]]
TEACHER = "mdd"  # of step 2, as in the release
BEATS = "beats source-only beyond its interval"
ROUNDS, WARM = 15, 2


def adapt(out: Path, pairs: Pairs, methods: list[str], seeds: list[int]) -> list[Row]:
    """Step 1: target accuracy, and whether its interval lies above the one of source-only; at last a ceiling.

    The ceiling is source-only trained on the target's own labelled training images: no adaptation, for it reads labels.
    """
    names = methods or [c.name for c in ADAPTATIONS if c.role == "adaptation" and c.trains]
    names = ["source-only", *(name for name in names if name != "source-only")]
    rows = []
    for source, target in pairs:
        for seed in seeds:
            base: HitCount | None = None
            for name in names:
                found, seconds = _run(out, source, target, seed, method=name, robustify="none")
                if found is None:
                    rows.append(_adapted(source, target, seed, name, seconds))
                    continue
                assert found.before is not None
                clean = found.before.clean
                base = clean if base is None else base
                above = _interval(clean)[0] > _interval(base)[1]
                row = _adapted(source, target, seed, name, seconds, clean)
                row |= {"target PGD": _text(found.before.worst), "A-distance": _distance(found)}
                rows.append(row | ({} if name == "source-only" else {BEATS: str(above)}))
            found, seconds = _run(out, target, source, seed, method="source-only", robustify="none")
            if found is not None:
                ceiling = HitCount(*found.theory["source_accuracy"])
                rows.append(_adapted(source, target, seed, "ceiling: target labels", seconds, ceiling))
    return rows


def robust(out: Path, pairs: Pairs, methods: list[str], seeds: list[int]) -> list[Row]:
    """Step 2 from one teacher: what each method keeps clean and gains under attack."""
    names = methods or [c.name for c in ADAPTATIONS if c.role == "robustification"]
    rows = []
    for source, target in pairs:
        for seed in seeds:
            teacher = _teacher(out, source, target, seed)
            for name in names:
                given = teacher
                if name == "rfa":  # its teacher must be a robust one
                    _run(out, source, target, seed, robustify="vat", teacher=teacher)
                    given = f"local-dir:{_folder(out, source, target, seed, {'robustify': 'vat', 'teacher': teacher})}"
                found, seconds = _run(out, source, target, seed, robustify=name, teacher=given)
                rows.append(_row(source, target, seed, name, found, seconds))
    return rows


def ablate(out: Path, pairs: Pairs, methods: list[str], seeds: list[int]) -> list[Row]:
    """DART whole, without each part, and with the other choices of reduction and start."""
    versions: dict[str, dict[str, Any]] = {
        "dart-urda": {},
        "without defense": {"ablate": ("defense",)},
        "without prediction": {"ablate": ("prediction",)},
        "without features": {"ablate": ("features",)},
        "without entropy weight": {"ablate": ("entropy-weight",)},
        "reduction released, lambda 0.1": {"reduction": "released", "trade_off": 0.1},
        "start from random weights": {"init": "imagenet"},
    }
    rows = []
    for source, target in pairs[:1]:
        for seed in seeds:
            teacher = _teacher(out, source, target, seed)
            for name, options in versions.items():
                found, seconds = _run(out, source, target, seed, teacher=teacher, **options)
                rows.append(_row(source, target, seed, name, found, seconds))
    return rows


def step(out: Path, pairs: Pairs, methods: list[str], seeds: list[int]) -> list[Row]:
    """CPU time of one step against ten forwards and backwards, two student forwards and a backward, in turns."""
    network = ImageClassifier(load_backbone("tiny-cnn"), 10, bottleneck=128)
    student = AdaptedStudent(copy_of(network), (DartUrda(),), Processes("cpu"))
    teacher = as_teacher(ClassifierModel("teacher", network, [str(i) for i in range(10)]), [str(i) for i in range(10)])
    options = Optimization(nesterov=True)
    accumulator, optimizer = Accumulator(student, teacher, options), make_optimizer(student.parameters, options)
    size = 36
    images = torch.rand(size, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    batch = Batch([f"target/{i}" for i in range(size)], images, torch.full((size,), UNKNOWN))
    runs: dict[str, Callable[[], object]] = {
        "floor": lambda: _floor(student, network, images),
        "dart": lambda: accumulator.gradients(DartUrda(), batch, ImageRng(0, batch.ids, "bench")),
        "dart and update": lambda: (
            accumulator.gradients(DartUrda(), batch, ImageRng(0, batch.ids, "bench")),
            update(student, optimizer, 0.0, None),
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(ROUNDS + WARM):
        for name in list(runs) if turn % 2 else list(runs)[::-1]:
            clock = time.process_time()
            runs[name]()
            if turn >= WARM:
                seconds[name].append(time.process_time() - clock)
    rows = []
    for name in ("dart", "dart and update"):
        ratios = sorted(a / b for a, b in zip(seconds[name], seconds["floor"], strict=True))
        met = median(ratios) <= 1.05
        rows.append(
            {
                "step": name,
                "CPU ms": f"{1000 * median(seconds[name]):.0f}",
                "floor CPU ms": f"{1000 * median(seconds['floor']):.0f}",
                "/ floor": f"{median(ratios):.3f} [{ratios[1]:.3f}, {ratios[-2]:.3f}]",
                "target": f"<= 1.05: {'met' if met else 'missed'}",
            }
        )
    return rows


def _floor(student: AdaptedStudent, teacher: ImageClassifier, images: torch.Tensor) -> None:
    with torch.no_grad():
        taught = teacher(images).logits
    labels = taught.argmax(dim=1)
    for _ in range(10):
        pixels = images.detach().requires_grad_(True)
        torch.autograd.grad(F.cross_entropy(student.attacked(pixels), labels, reduction="sum"), pixels)
    for parameter in student.parameters.values():
        parameter.grad = None
    first, second = student(images), student(images)
    ((first.logits - second.logits.flip(0)).square().mean() + second.logits.mean()).backward()  # type: ignore[no-untyped-call]


def _adapted(source: str, target: str, seed: int, name: str, seconds: str, clean: HitCount | None = None) -> Row:
    """A row of step 1, what was not measured left open."""
    row = {"pair": f"{source} -> {target}", "seed": str(seed), "method": name}
    row |= {"target clean": "–" if clean is None else _text(clean)}
    return row | {"target PGD": "–", "A-distance": "–", "seconds": seconds, BEATS: "–"}


def _teacher(out: Path, source: str, target: str, seed: int) -> str:
    options = {"method": TEACHER, "robustify": "none"}
    _run(out, source, target, seed, **options)
    return f"local-dir:{_folder(out, source, target, seed, options)}"


def _run(out: Path, source: str, target: str, seed: int, **options: Any) -> tuple[Adapted | None, str]:
    """The result, and its seconds, none if it was found done; no result, and why, where training stopped."""
    folder, started = _folder(out, source, target, seed, options), time.monotonic()
    given = {"source": source, "target": target, "seed": seed, "out": folder, "device": "cpu", "threads": 1}
    try:
        found = AdaptationJob(make_urda_settings(given | options)).run(Progress())
    except UserError as error:  # diverged: one row, not the end of the table
        return None, f"stopped: {str(error).partition(';')[0]}"
    return found, "–" if found.reused else f"{time.monotonic() - started:.0f}"


def _folder(out: Path, source: str, target: str, seed: int, options: dict[str, Any]) -> Path:
    words = [source, target, str(seed), *(f"{k}-{v}" for k, v in sorted(options.items()) if k != "teacher")]
    given = options.get("teacher")
    words += [f"from-{Path(str(given)).name}"] if given else []
    return out / re.sub(r"[:/()', ]", "-", "-".join(words))


def _row(source: str, target: str, seed: int, name: str, found: Adapted | None, seconds: str) -> Row:
    if found is None:
        return {"pair": f"{source} -> {target}", "seed": str(seed), "method": name, "seconds": seconds}
    before, after = found.before, found.after
    assert after is not None
    gain = "–" if before is None else f"{100 * (after.worst.share - before.worst.share):+.1f}"
    loss = "–" if before is None else f"{100 * (after.clean.share - before.clean.share):+.1f}"
    return {
        "pair": f"{source} -> {target}",
        "seed": str(seed),
        "method": name,
        "clean": _text(after.clean),
        "PGD true": _text(after.true_labels),
        "PGD pseudo": _text(after.pseudo_labels),
        "worst": _text(after.worst),
        "teacher clean / worst": "–" if before is None else _pair(before),
        "clean, worst against teacher": f"{loss}, {gain}",
        "A_T": f"{after.disagreement.share:.3f}",
        "seconds": seconds,
    }


def _pair(numbers: TargetNumbers) -> str:
    return f"{100 * numbers.clean.share:.1f} / {100 * numbers.worst.share:.1f}"


def _distance(found: Adapted) -> str:
    errors, n = found.theory["domain_errors"]
    return f"{max(0.0, 2 - 4 * errors / n):.2f}"


def _interval(count: HitCount) -> tuple[float, float]:
    return wilson(count.hits, count.n)


def _text(count: HitCount) -> str:
    low, high = _interval(count)
    return f"{100 * count.share:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
