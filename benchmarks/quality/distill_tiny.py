"""tiny-vit -> tiny-rn on `fashion` alone: what it gains at 8/255, and what it loses on sets it never saw."""

from __future__ import annotations

import time
from pathlib import Path

from benchmarks.speed.fixed import Row
from vlmdefend.data import load_dataset
from vlmdefend.data.base import ImageSet
from vlmdefend.data.transforms import PixelTransform
from vlmdefend.evaluation.launchers.inline import evaluate
from vlmdefend.evaluation.statistics.intervals import wilson
from vlmdefend.models import load_model
from vlmdefend.progress import Progress
from vlmdefend.training.clip.distillation_job import DistillationJob
from vlmdefend.training.clip.held_out import correct
from vlmdefend.training.loop.data import TrainingImages
from vlmdefend.training.loop.results import HitCount
from vlmdefend.training.settings.distill_settings import make_distill_settings

EPS, IMAGES = "8/255", 200
ATTACKS = ("pgd:steps=100", "autoattack")
UNSEEN = {
    "mnist": ("mnist",),
    "uci-digits": ("uci-digits",),
    "emoji": ("emoji:google", "emoji:twitter", "emoji:fluent", "emoji:openmoji", "emoji:sketch"),
}
PLANS: dict[str, dict[str, object]] = {"HPT-GPD": {}, "HPT alone": {"stage": "b", "pull": 1.0}}


def tiny(out: Path) -> list[Row]:
    """Train both (or find them done), then evaluate vanilla, pivot, HPT-GPD and HPT alone on test splits."""
    models, seconds = {"vanilla": "tiny-rn"}, {"vanilla": "", "pivot": ""}
    for name, changes in PLANS.items():
        folder = out / name.replace(" ", "-").lower()
        settings = make_distill_settings(
            {"proxy": "tiny-vit", "target": "tiny-rn", "device": "cpu", "threads": 1, "out": folder, **changes}
        )
        clock = time.process_time()
        found = DistillationJob(settings).run(Progress())
        seconds[name] = "found done" if found.reused else f"{(time.process_time() - clock) / 60:.1f}"
        if name == "HPT-GPD":
            models["pivot"] = f"local-dir:{folder / 'pivot'}"
        models[name] = f"local-dir:{folder}"
    return [row_of(name, model, seconds[name], out) for name, model in models.items()]


def row_of(name: str, model: str, minutes: str, out: Path) -> Row:
    """One model: worst of both attacks on the test split of fashion, and clean accuracy elsewhere."""
    found = evaluate(
        out=out / "runs", model=model, attack=list(ATTACKS), eps=EPS, limit=IMAGES, device="cpu", threads=1
    )
    assert not found.failures, found.failures
    rows = [rows for _, rows in found.results]
    n = len(rows[0])
    worst = sum(all(row.robust for row in same) for same in zip(*rows, strict=True))
    clean = count(model, [load_dataset("fashion")])
    unseen = {s: share(count(model, [load_dataset(part) for part in parts])) for s, parts in UNSEEN.items()}
    return {
        "tiny-rn": name,
        f"robust {EPS}, worst of PGD-100 and AA": share(HitCount(worst, n)),
        "fashion clean": share(clean),
        **unseen,
        "CPU minutes": minutes,
    }


def count(model: str, sets: list[ImageSet]) -> HitCount:
    """Clean accuracy over whole test splits, with the prompt of the protocol `unified`."""
    loaded, total = load_model(model, device="cpu"), HitCount(0, 0)
    for images in sets:
        pixels = PixelTransform(loaded.image_size, loaded.interpolation)
        batch = TrainingImages(images, pixels).batch(range(len(images)))
        found = correct(loaded.zero_shot(images.class_names, ("a photo of a {c}.",)), batch.images, batch)
        total = HitCount(total.hits + found.hits, total.n + found.n)
    return total


def share(counted: HitCount) -> str:
    """``85.2 [81.8, 88.0]``."""
    low, high = wilson(counted.hits, counted.n)
    return f"{100 * counted.share:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
