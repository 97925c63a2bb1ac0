"""One HPT step with PGD-2 against its floor, and against the cost profile of the official code."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.speed.fixed import Row, spread, take_turns, verdict
from benchmarks.speed.subjects import _random_weights
from vlmdefend.defenses.training_time.hpt_gpd import HptGpd
from vlmdefend.models.clip.vision_language import VisionLanguageModel
from vlmdefend.rng import ImageRng
from vlmdefend.training.clip.classifier import TrainedClassifier, choose_trained
from vlmdefend.training.clip.student import AutocastTeacher, ClipStudent
from vlmdefend.training.loop.processes import Processes
from vlmdefend.training.loop.stage import Optimization
from vlmdefend.training.loop.update import Accumulator, make_optimizer, update
from vlmdefend.types import Batch

PAIRS = (("ViT-B-32", "RN50"), ("RN50", "ViT-B-32"))  # proxy, target
FULL = (64, 200)  # images of a batch, classes: the official setting
SMALLER = 8  # both are divided by this, so that their costs keep their ratio
EPS, ROUNDS = 1 / 255, 3
TEMPLATE = ("This is a photo of a {c}",)


def step(out: Path) -> list[Row]:
    """CPU seconds and paired ratios; the programs take turns."""
    rows = []
    models = {name: _random_weights(name) for pair in PAIRS for name in pair}
    for proxy, target in PAIRS:
        runs = runs_of(models[proxy], copy.deepcopy(models[target]))
        seconds = take_turns(runs, ROUNDS)
        for name, own in seconds.items():
            to_floor = [a / b for a, b in zip(own, seconds["floor"], strict=True)]
            to_ours = [a / b for a, b in zip(own, seconds["vlmdefend"], strict=True)]
            target_text = {
                "vlmdefend": f"≤ 1.05 x floor: {verdict(median(to_floor) <= 1.05)}",
                "official cost profile": f"≥ 3 x vlmdefend: {verdict(median(to_ours) >= 3.0)}",
            }.get(name, "")
            rows.append(
                {
                    "proxy -> target": f"{proxy} -> {target}, batch {FULL[0] // SMALLER}, {FULL[1] // SMALLER} classes",
                    "program": name,
                    "CPU s": f"{median(own):.3g}",
                    "/ floor": spread(to_floor),
                    "/ vlmdefend": spread(to_ours, 2),
                    "target": target_text,
                }
            )
    return rows


def runs_of(proxy: VisionLanguageModel, target: VisionLanguageModel) -> dict[str, Callable[[], object]]:
    """The programs that are compared, on the same weights and images."""
    count, classes = FULL[0] // SMALLER, [f"class number {i}" for i in range(FULL[1] // SMALLER)]
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 3, target.image_size, target.image_size, generator=generator)
    batch = Batch([str(i) for i in range(count)], images, torch.arange(count) % len(classes))
    student = student_of(target, classes)
    teacher = TrainedClassifier(proxy, classes, TEMPLATE)
    accumulator = Accumulator(student, AutocastTeacher(teacher, student.processes), Optimization(batch_size=count))
    optimizer = make_optimizer(student.parameters, Optimization())
    objective = HptGpd(eps=EPS, alpha=EPS, steps=2)

    def ours() -> None:
        accumulator.gradients(objective, batch, ImageRng(0, batch.ids, "bench"))
        update(student, optimizer, 0.0, None)

    def floor() -> None:
        """3 forward and backward of the image encoder, two to the pixels and one to the weights, and 1 forward."""
        for _ in range(2):
            pixels = images.detach().requires_grad_(True)
            torch.autograd.grad(student.classifier.features(pixels).sum(), pixels)
        student.classifier.features(images).sum().backward()
        with torch.no_grad():
            teacher.features(images)
        for parameter in student.parameters.values():
            parameter.grad = None

    return {"floor": floor, "vlmdefend": ours, "official cost profile": official(proxy, target, classes, batch)}


def student_of(target: VisionLanguageModel, classes: list[str]) -> ClipStudent:
    """The target with its image tower trained."""
    classifier = TrainedClassifier(target, classes, TEMPLATE)
    return ClipStudent(classifier, choose_trained(classifier, "image"), Processes("cpu"))


def official(
    proxy: VisionLanguageModel, target: VisionLanguageModel, classes: list[str], batch: Batch
) -> Callable[[], object]:
    """What the official step computes, by its description; every parameter wants a gradient, as there."""
    clips: list[Any] = [copy.deepcopy(model.clip).requires_grad_(True) for model in (target, proxy)]
    tokens = [model.tokenizer([TEMPLATE[0].format(c=name) for name in classes]) for model in (target, proxy)]
    statistics = [
        (torch.tensor(model.mean).view(3, 1, 1), torch.tensor(model.std).view(3, 1, 1)) for model in (target, proxy)
    ]

    def logits(which: int, images: Tensor) -> Tensor:
        clip, (mean, std) = clips[which], statistics[which]
        text = clip.encode_text(tokens[which], normalize=True)
        features = clip.encode_image((images - mean) / std, normalize=True)
        found: Tensor = clip.logit_scale.exp() * features @ text.T
        return found

    def run() -> None:
        delta = torch.empty_like(batch.images).uniform_(-EPS, EPS).requires_grad_(True)
        for _ in range(2):
            F.cross_entropy(logits(0, batch.images + delta), batch.labels).backward()
            assert delta.grad is not None
            delta.data = (delta + EPS * delta.grad.sign()).clamp(-EPS, EPS).data
            delta.grad.zero_()
        adversarial = (batch.images + delta.detach()).clamp(0, 1)
        student, teacher = logits(0, adversarial), logits(1, adversarial)
        F.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="sum").backward()
        for clip in clips:
            clip.zero_grad(set_to_none=True)

    return run
