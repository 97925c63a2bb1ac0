"""Train every training-time defense on the embedded models with one budget, and print what each came to.

    python -m benchmarks.quality.training step                     each method's step: CPU time against its floor
    python -m benchmarks.quality.training step --methods adv-lora --rounds 40
    python -m benchmarks.quality.training table                    all methods, tiny-vit and tiny-rn, three seeds: hours
    python -m benchmarks.quality.training table --methods tecoa,fare --models tiny-vit --seeds 0

Trained on ``fashion`` with the same number of steps and images for all; measured on its test split and on the sets
that were not trained on: clean and PGD-100; AutoAttack (standard), the dearest, on fewer images of ``fashion``, and
beside it PGD-100 on those same images. A cell is the mean over seeds in %, with its lowest and highest seed where
there are several, and the 95 % interval of one seed over images where there is one. Floor of a step: its forward and
backwards of the image encoder, through the same classes, without loss, schedule or log. One CPU thread, nothing is
downloaded; models and what was measured of them stay in ``--out`` and the same command goes on. The exit code is 0
whatever comes out.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, median
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: its thread pool reads this once
EPS, PARTS = {"tiny-vit": "16/255", "tiny-rn": "8/255"}, ("step", "table")
OTHERS = ("mnist", "uci-digits", "emoji:google")
IMAGES = 32


def main() -> None:
    """Run the requested parts and print one table per part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", default="step", choices=PARTS)
    parser.add_argument("--out", type=Path, default=Path("training-benchmark"), help="where the models are kept")
    parser.add_argument("--methods", help="comma-separated; all unless given")
    parser.add_argument("--models", default=",".join(EPS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--images", type=int, default=200, help="test images of each set")
    parser.add_argument("--autoattack", type=int, default=50, help="test images that AutoAttack gets; 0: none")
    parser.add_argument("--limit", type=int, default=2000, help="training images")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10, help="of step: pairs that are measured")
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    import torch
    from tabulate import tabulate

    from vlmdefend.defenses.training_time import OBJECTIVES

    torch.set_num_threads(1)
    known = [cls.name for cls in OBJECTIVES if cls.schedule is not None]
    methods = asked.methods.split(",") if asked.methods else known
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, CPU")
    rows = []
    for row in {"step": steps, "table": table}[asked.part](asked, methods):
        rows.append(row)
        print(f"\n{tabulate(rows, headers='keys', tablefmt='github', disable_numparse=True)}", flush=True)


def steps(asked: argparse.Namespace, methods: list[str]) -> Iterator[dict[str, str]]:
    """One step of each method against the forwards and backwards that it needs, taking turns."""
    import torch

    from vlmdefend.data.transforms import PixelTransform
    from vlmdefend.errors import UserError
    from vlmdefend.rng import ImageRng
    from vlmdefend.training.loop.data import TrainingImages
    from vlmdefend.training.loop.update import Accumulator, make_optimizer, update

    for model in asked.models.split(","):
        for method in methods:
            try:
                training = made(asked, method, model, 0)
            except UserError as error:
                print(f"\n{method} on {model} is left out: {error}")
                continue
            if training.settings.objective.cost.once:
                print(f"\n{method} is left out: it attacks before its first step, and no image is seen in the others")
                continue
            size = training.model.image_size
            batch = TrainingImages(training.images, PixelTransform(size)).batch(range(IMAGES))
            objective, options = training.settings.objective, training.settings.optimization
            student, teacher = training.student, training._teacher()
            accumulator, optimizer = Accumulator(student, teacher, options), make_optimizer(student.parameters, options)

            def step(
                accumulator: Any = accumulator, objective: Any = objective, student: Any = student, batch: Any = batch
            ) -> None:
                accumulator.gradients(objective, batch, ImageRng(0, batch.ids, "bench"))
                update(student, optimizer, 1e-9, None)  # noqa: B023 - called in this turn of the loop only
                student.refresh()

            cost = objective.cost
            ascents = objective.steps

            def floor(student: Any = student, cost: Any = cost, batch: Any = batch, ascents: int = ascents) -> None:
                for _ in range(ascents):
                    pixels = batch.images.clone().requires_grad_(True)
                    torch.autograd.grad(student.attacked(pixels).sum(), pixels)
                said = [student(batch.images).logits.sum() for _ in range(cost.forward_backwards - ascents)]
                torch.stack(said).sum().backward()
                student.refresh()
                for _ in range(cost.teacher_forwards):
                    with torch.no_grad():
                        student.attacked(batch.images)

            found: dict[str, list[float]] = {"step": [], "floor": []}
            for number in range(asked.rounds + 1):
                for name, call in (("step", step), ("floor", floor)):
                    begun = time.process_time()
                    call()
                    if number:  # the first round warms up
                        found[name].append(time.process_time() - begun)
            ratio = median(a / b for a, b in zip(found["step"], found["floor"], strict=True))
            yield {
                "model": model,
                "method": method,
                "forward+backwards": str(cost.forward_backwards),
                "vanilla forwards": str(cost.teacher_forwards),
                "step, ms": f"{1000 * median(found['step']):.0f}",
                "x floor": f"{ratio:.2f}",
                "target": "<= 1.08",
            }


def table(asked: argparse.Namespace, methods: list[str]) -> Iterator[dict[str, str]]:
    """The vanilla model and each method: clean, PGD-100 and AutoAttack."""
    from vlmdefend.errors import UserError
    from vlmdefend.progress import Progress

    seeds = [int(seed) for seed in asked.seeds.split(",")]
    for model in asked.models.split(","):
        yield {"model": model, "method": "none", **shown([measured(model, asked, model, asked.out / f"{model}-none")])}
        for method in methods:
            found, spent = [], []
            for seed in seeds:
                try:
                    training = made(asked, method, model, seed)
                except UserError as error:
                    print(f"\n{method} on {model} is left out: {error}")
                    break
                out, begun = training.folder.out, time.process_time()
                if not training.run(Progress()).reused:
                    (out / "seconds.json").write_text(json.dumps(time.process_time() - begun))
                if (out / "seconds.json").exists():  # not so where a run was ended half-way and went on
                    spent.append(json.loads((out / "seconds.json").read_text()))
                found.append(measured(f"local-dir:{out}", asked, model, out))
            if found:
                yield {
                    "model": model,
                    "method": method,
                    **shown(found),
                    "forward+backwards": f"{training.settings.objective.cost.forward_backwards}",
                    "CPU s": f"{mean(spent):.0f}" if spent else "–",
                }


def made(asked: argparse.Namespace, method: str, model: str, seed: int) -> Any:
    """A run of the command's own defaults, all methods with the same images and epochs."""
    from vlmdefend.training.clip.training_job import DefenseTrainingJob
    from vlmdefend.training.settings.train_settings import make_train_settings

    given = {"method": method, "model": model, "seed": seed, "eps": EPS[model], "epochs": asked.epochs}
    out = asked.out / f"{model}-{method.replace(':', '-')}-{seed}-{asked.epochs}-{asked.limit}"
    settings = {**given, "limit": asked.limit, "device": "cpu", "out": out, "held_out": 100}
    return DefenseTrainingJob(make_train_settings(settings))


def measured(spec: str, asked: argparse.Namespace, name: str, kept: Path) -> dict[str, list[int]]:
    """Hits and images of every column; what is already in ``kept`` is not measured again."""
    from vlmdefend.attacks import ATTACKS
    from vlmdefend.data import load_dataset
    from vlmdefend.data.transforms import PixelTransform
    from vlmdefend.models import load_model
    from vlmdefend.training.clip.held_out import accuracies
    from vlmdefend.training.loop.data import TrainingImages
    from vlmdefend.training.loop.processes import Processes
    from vlmdefend.types import parse_eps

    kept.mkdir(parents=True, exist_ok=True)
    file, eps = kept / f"measured-{asked.images}-{asked.autoattack}.json", parse_eps(EPS[name])
    found: dict[str, list[int]] = json.loads(file.read_text()) if file.exists() else {}
    cells = [(dataset, "PGD-100", "pgd:steps=100", asked.images) for dataset in ("fashion", *OTHERS)]
    if asked.autoattack:
        cells.append(("fashion", "AutoAttack", "autoattack", asked.autoattack))
        cells.append(("fashion", "PGD-100 there", "pgd:steps=100", asked.autoattack))
    model = None
    for dataset, column, attack, count in cells:
        if f"{dataset} {column}" in found:
            continue
        model = model or load_model(spec, device="cpu")
        images = load_dataset(dataset, "test", limit=count)
        batch = TrainingImages(images, PixelTransform(model.image_size)).batch(range(len(images)))
        pipeline = model.zero_shot(images.class_names, ("a photo of a {c}.",))
        each = accuracies(pipeline, batch, eps, 0, Processes("cpu"), ATTACKS.create(attack))
        if column == "PGD-100":
            found[f"{dataset} clean"] = list(each.clean)
        found[f"{dataset} {column}"] = list(each.robust)
        file.write_text(json.dumps(found))
    return found


def shown(found: list[dict[str, list[int]]]) -> dict[str, str]:
    """Mean and range over seeds, or the interval of one."""
    from vlmdefend.evaluation.statistics.intervals import wilson

    cells = {}
    for column in found[0]:
        counts = [one[column] for one in found]
        shares = [100 * hits / n for hits, n in counts]
        low, high = (min(shares), max(shares)) if len(counts) > 1 else (100 * s for s in wilson(*counts[0]))
        cells[column] = f"{mean(shares):.1f} [{low:.1f}, {high:.1f}]"
    return cells


if __name__ == "__main__":
    main()
