"""Measure what defenses cost on the clean path and print it against the targets.

    python -m benchmarks.quality.defenses tuning      r_tpt at 64 views: batch 16 against one image at a time
    python -m benchmarks.quality.defenses overhead    every training-free defense as a multiple of one forward
    python -m benchmarks.quality.defenses ttc         ttc against the forwards and gradients of its definition
    python -m benchmarks.quality.defenses all         the three in this order
    python -m benchmarks.quality.defenses verdicts    every defense under PGD-10 at 4/255, all three attackers: hours
    python -m benchmarks.quality.defenses verdicts --models tiny-rn --images 100 --names ttc,jpeg,ttc+jpeg

One CPU thread, the embedded models and images, nothing is downloaded. Ratios of CPU seconds of runs that take turns,
as median [min-max]; the exit code is 0 whether or not a target is met. Verdicts are those of ``vlmdefend evaluate``;
finished cells stay in ``--out`` and are found there.
"""

from __future__ import annotations

import argparse
import os
import warnings
from functools import partial
from pathlib import Path
from statistics import median

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: its thread pool reads this once

import torch
import torch.nn.functional as F
import yaml
from tabulate import tabulate
from torch import Tensor

import vlmdefend
from benchmarks.speed.fixed import Row, Run, spread, take_turns, verdict
from vlmdefend.data.loader import load_batch
from vlmdefend.data.open import load_dataset
from vlmdefend.data.transforms import PixelTransform
from vlmdefend.defenses import DEFENSES
from vlmdefend.defenses.base import Defense
from vlmdefend.defenses.test_time.r_tpt import RTpt
from vlmdefend.defenses.training_free.ttc import Ttc
from vlmdefend.defenses.views.crops import augmented_views, most_confident
from vlmdefend.evaluation.cell.query_count import CountingModel
from vlmdefend.evaluation.grid.grid import ATTACKERS
from vlmdefend.models import load_model
from vlmdefend.models.prompts.prompt_tower import PromptTower
from vlmdefend.models.zero_shot.classifier import ZeroShotClassifier
from vlmdefend.published.evidence import Evidence, MeasuredRow
from vlmdefend.reporting.tables.groups import attacker_text, clean_text, passes_text, worst_text
from vlmdefend.reporting.verdicts.row import VerdictRow
from vlmdefend.reporting.verdicts.verdict import verdict_rows
from vlmdefend.rng import ImageRng
from vlmdefend.types import Batch, Pipeline, format_eps

MODELS = ("tiny-rn", "tiny-vit")
ROUNDS = 5


def main() -> None:
    """Run the requested parts and print one table per part."""
    parts = {"tuning": tuning, "overhead": overhead, "ttc": ttc}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", default="all", choices=[*parts, "all", "verdicts"])
    parser.add_argument("--models", default=",".join(MODELS), help="of the verdicts")
    parser.add_argument("--names", default="", help="comma-separated; default: every defense")
    parser.add_argument("--images", type=int, default=200, help="of the verdicts")
    parser.add_argument("--write", action="store_true", help="write the verdicts to vlmdefend/published/defenses")
    parser.add_argument("--out", type=Path, default=Path("runs/defenses"), help="where the verdicts' cells are kept")
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, CPU")
    if asked.part == "verdicts":
        names = ["none", *(name for name in asked.names.split(",") if name)] if asked.names else DEFENSES.names()
        parts = {
            "verdicts": partial(verdicts, asked.out, asked.models.split(","), names, asked.images, write=asked.write)
        }
        asked.part = "all"
    for part in parts if asked.part == "all" else [asked.part]:
        print(f"\n{part}\n\n{tabulate(parts[part](), headers='keys', tablefmt='github', disable_numparse=True)}")


def verdicts(out: Path, models: list[str], names: list[str], images: int, *, write: bool = False) -> list[Row]:
    """Clean, under each attacker, worst with its interval, what the deployed pipeline costs, flags."""
    rows = []
    for model in models:
        found = vlmdefend.evaluate(out, model=model, defense=names, eps="4/255", limit=images, threads=1)
        for failure in found.failures:
            print(f"failed: {failure}")
        for line in verdict_rows(found.results):
            if write:
                write_evidence(measured_row(line))
            rows.append(
                {
                    "model": model,
                    "defense": line.pipeline.defense,
                    "clean": clean_text(line),
                    **{attacker: attacker_text(line, attacker) for attacker in ATTACKERS},
                    "worst [95 %]": worst_text(line),
                    "fwd+bwd": passes_text(line.cost.deployed_forwards, line.cost.deployed_backwards),
                    "flags": " ".join(line.flags),
                }
            )
    return rows


def measured_row(line: VerdictRow) -> tuple[str, MeasuredRow]:
    """The defense, and its verdict as a row of ``vlmdefend/published``."""
    assert line.clean is not None
    assert line.worst is not None
    assert line.worst.interval is not None
    low, high = (round(100 * end, 1) for end in line.worst.interval)
    accuracies = {name: round(100 * proportion.value, 1) for name, proportion in line.robust.items()}
    return line.pipeline.defense, MeasuredRow(
        model=line.pipeline.model,
        dataset=line.pipeline.dataset,
        n=line.n,
        protocol=line.pipeline.protocol,
        norm=line.norm,
        eps=format_eps(line.eps),
        attack="pgd:steps=10",
        clean=round(100 * line.clean.value, 1),
        **accuracies,
        worst=round(100 * line.worst.value, 1),
        low=low,
        high=high,
        masked="MASKED?" in line.flags,
        passes=passes_text(line.cost.deployed_forwards, line.cost.deployed_backwards),
        source="python -m benchmarks.quality.defenses verdicts",
    )


def write_evidence(found: tuple[str, MeasuredRow]) -> None:
    """Writes a measured row to the file of the defense, in place of the row of the same setting."""
    defense, row = found
    same = ("model", "dataset", "norm", "eps", "attack")
    file = Path(vlmdefend.__file__).parent / "published" / "defenses" / f"{defense}.yaml"
    content = yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else {"defense": defense}
    kept = [one for one in content.get("measured", []) if any(one[key] != getattr(row, key) for key in same)]
    new = row.model_dump(mode="json", exclude_defaults=True)
    content["measured"] = sorted([*kept, new], key=lambda one: (one["model"], one["eps"]))
    Evidence.model_validate(content)
    file.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=116), encoding="utf-8")


def tuning() -> list[Row]:
    """Three programs on the same 16 images: a batch, one by one, one by one in the order of the official code."""
    rows = []
    for name in MODELS:
        classifier, batch = subject(name, 16)
        pipeline = RTpt().wrap(classifier)
        programs = {
            "batch 16": lambda p=pipeline, b=batch: deployed(p, b),
            "one by one": lambda p=pipeline, b=batch: torch.cat([deployed(p, one(b, i)) for i in range(16)]),
            "one by one, as published": lambda c=classifier, b=batch: torch.stack(
                [published(c, one(b, i)) for i in range(16)]
            ),
        }
        answers = {program: run() for program, run in programs.items()}
        seconds = take_turns(programs, ROUNDS)
        for program, own in seconds.items():
            faster = [a / b for a, b in zip(own, seconds["batch 16"], strict=True)]
            same = torch.equal(answers[program].argmax(dim=1), answers["batch 16"].argmax(dim=1))
            apart = float((answers[program] - answers["batch 16"]).abs().max())
            rows.append(
                {
                    "model": name,
                    "program": program,
                    "images / CPU s": f"{16 / median(own):.1f}",
                    "batch 16 is faster by": spread(faster, 2),
                    "same predictions": f"{'yes' if same else 'no'}, logits within {apart:.0e}",
                    "target": "" if program == "batch 16" else f"≥ 3: {verdict(median(faster) >= 3)}",
                }
            )
    return rows


def published(classifier: ZeroShotClassifier, batch: Batch) -> Tensor:
    """(C,) logits of one image the way R-TPT's official code goes: every stage predicts the views anew.

    Image alone, features, logits, tuning step and prediction are five passes of the image tower; the whole context of
    the text tower is read; the optimizer is torch's.
    """
    views = augmented_views(batch.images, ImageRng(0, batch.ids, "bench"), 64)[0]
    side = classifier.text_side
    assert side is not None
    tower = PromptTower(side)
    context = torch.nn.Parameter(tower.context.clone())
    optimizer = torch.optim.AdamW([context], lr=5e-3)
    embedded, scale = side.table[side.tokens[:, 0]], classifier.clip.logit_scale.exp()

    def logits(images: Tensor) -> Tensor:
        with torch.no_grad():
            features = F.normalize(classifier.features(images), dim=1)
        words = context[0].expand(len(embedded), -1, -1)
        prompts = torch.cat([embedded[:, :1], words, embedded[:, 1 + words.shape[1] :]], dim=1)
        return scale * features @ side.encode(side.tokens[:, 0], prompts).T

    with torch.no_grad():
        logits(batch.images)
        features = F.normalize(classifier.features(views), dim=1)
        logits(views)
    found = logits(views)
    p = found[most_confident(found[None], 0.1)[0]].log_softmax(dim=1)
    (-(p.exp() * p).sum(dim=1).mean()).backward()
    optimizer.step()
    with torch.no_grad():
        return RTpt().weights(features[None])[0] @ logits(views)


def overhead() -> list[Row]:
    """Each training-free defense on 16 images, without gradient, and what it asks the model."""
    rows = []
    for name in MODELS:
        classifier, batch = subject(name, 16)
        for defense_name in DEFENSES.names():
            if DEFENSES.get(defense_name).paradigm != "training-free":
                continue
            defense = DEFENSES.create(defense_name)
            bare, defended = partial(deployed, classifier, batch), partial(deployed, defense.wrap(classifier), batch)
            seconds = take_turns({"bare": bare, "defended": defended}, ROUNDS)
            ratios = [a / b for a, b in zip(seconds["defended"], seconds["bare"], strict=True)]
            rows.append(
                {
                    "model": name,
                    "defense": defense_name,
                    "× one forward": spread(ratios, 2),
                    "fwd+bwd per image": asked_of(defense, classifier, batch),
                    "ms / image": f"{1000 * median(seconds['defended']) / 16:.2f}",
                }
            )
    return rows


def ttc() -> list[Row]:
    """The floor: two forwards, and two forwards with the gradient of the distance to the first one's features."""
    rows = []
    for name in MODELS:
        classifier, batch = subject(name, 16)
        pipeline = Ttc().wrap(classifier)

        def floor(model: ZeroShotClassifier = classifier, images: Tensor = batch.images) -> Tensor:
            with torch.no_grad():
                reference = model(images).features
            for _ in range(2):
                with torch.enable_grad():
                    pixels = images.detach().requires_grad_(True)
                    features = model(pixels).features
                    assert features is not None
                    distance = (features - reference).square().sum()
                torch.autograd.grad(distance, pixels)
            with torch.no_grad():
                return model(images).logits

        programs: dict[str, Run] = {"floor": floor, "ttc": partial(deployed, pipeline, batch)}
        seconds = take_turns(programs, 4 * ROUNDS)
        ratios = [a / b for a, b in zip(seconds["ttc"], seconds["floor"], strict=True)]
        rows.append(
            {
                "model": name,
                "ms / image": f"{1000 * median(seconds['ttc']) / 16:.2f}",
                "fwd+bwd per image": asked_of(Ttc(), classifier, batch),
                "/ floor": spread(ratios),
                "target": f"≤ 1.1: {verdict(median(ratios) <= 1.1)}",
            }
        )
    return rows


def subject(name: str, count: int) -> tuple[ZeroShotClassifier, Batch]:
    """An embedded model with images of the fashion set."""
    model, images = load_model(name, device="cpu"), load_dataset("fashion", limit=count)
    batch = load_batch(images, range(count), PixelTransform(model.image_size), skip_bad=False)[0]
    return model.zero_shot(images.class_names, ["a photo of a {c}."]), batch


def one(batch: Batch, index: int) -> Batch:
    """A batch of one of the images."""
    return Batch([batch.ids[index]], batch.images[index : index + 1], batch.labels[index : index + 1])


def deployed(pipeline: Pipeline, batch: Batch) -> Tensor:
    """(B, C) logits, without gradient."""
    with torch.no_grad():
        return pipeline(batch.images, ImageRng(0, batch.ids, "bench")).logits


def asked_of(defense: Defense, classifier: ZeroShotClassifier, batch: Batch) -> str:
    """Forwards and backwards of the model per image."""
    counted = CountingModel(classifier)
    deployed(defense.wrap(counted), batch)
    return f"{counted.forwards / len(batch.ids):g}+{counted.backwards / len(batch.ids):g}"


if __name__ == "__main__":
    main()
