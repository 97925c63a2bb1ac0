"""Two small domains of three shapes, and runs on them that take a second."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vlmdefend.models.backbone_names import load_backbone
from vlmdefend.models.classifier.classifier import ClassifierModel, ImageClassifier
from vlmdefend.models.classifier.folder import save_classifier
from vlmdefend.progress import Progress
from vlmdefend.training.adaptation.job import AdaptationJob, Adapted
from vlmdefend.training.loop.results import EpochResult
from vlmdefend.training.settings.adaptation_settings import make_urda_settings

CLASSES = ("bar", "cross", "square")
SIDE = 28


def picture(label: int, seed: int, *, dark: bool) -> Image.Image:
    """A shape at a random place over noise; the target domain is dark on light."""
    generator = torch.Generator().manual_seed(1000 * label + seed + 500 * dark)
    top, left = torch.randint(2, 10, (2,), generator=generator).tolist()
    levels = torch.rand(SIDE, SIDE, generator=generator) * 0.3
    part = levels[top : top + 14, left : left + 14]
    if label == 0:
        part[5:9, :] = 0.9
    elif label == 1:
        part[5:9, :] = 0.9
        part[:, 5:9] = 0.9
    else:
        part[:] = 0.9
    levels = 1 - levels if dark else levels
    return Image.fromarray((levels * 255).to(torch.uint8).numpy()).convert("RGB")


def write_domains(root: Path, train: int = 8, test: int = 4) -> Path:
    """``root/{light,dark}/{train,test}/class/*.png``."""
    for domain, dark in (("light", False), ("dark", True)):
        for split, count, first in (("train", train, 0), ("test", test, 100)):
            for label, name in enumerate(CLASSES):
                folder = root / domain / split / name
                folder.mkdir(parents=True, exist_ok=True)
                for i in range(count):
                    picture(label, first + i, dark=dark).save(folder / f"{i}.png")
    return root


@dataclass
class Heard(Progress):
    """Keeps the progress that is reported, and raises after a step as a kill would stop the run."""

    at: tuple[str, int] | None = None
    lines: list[dict[str, Any]] = field(default_factory=list)
    epochs: list[EpochResult] = field(default_factory=list)

    def advance(self, unit: Any, count: int = 1) -> None:
        self.lines.append(unit)
        if (unit["stage"], unit["step"]) == self.at:
            raise KeyboardInterrupt

    def end(self, result: EpochResult, *, reused: bool = False) -> None:
        self.epochs.append(result)


QUICK: dict[str, Any] = {
    "backbone": "tiny-cnn",
    "bottleneck": 16,
    "epochs_teacher": 2,
    "epochs_student": 2,
    "lr_teacher": 0.02,
    "lr_student": 0.02,
    "batch_size": 8,
    "batch_size_student": 8,
    "steps": 2,
    "augment": "off",
    "device": "cpu",
}
Make = Callable[..., AdaptationJob]


def adaptation(root: Path, out: Path, **options: Any) -> AdaptationJob:
    """A run made ready: light to dark."""
    given = {"source": f"folder:{root / 'light'}", "target": f"folder:{root / 'dark'}", "out": out}
    return AdaptationJob(make_urda_settings({**QUICK, **given, **options}))


def run(root: Path, out: Path, **options: Any) -> Adapted:
    """The same, run to its end."""
    return adaptation(root, out, **options).run(Progress())


def saved_teacher(folder: Path, seed: int = 3) -> str:
    """A random classifier of these classes, as a model's name."""
    network = ImageClassifier(load_backbone("tiny-cnn", seed=seed), len(CLASSES), bottleneck=16, seed=seed)
    with torch.no_grad():
        for _ in range(5):
            network.training_outputs(torch.rand(16, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2)))
    save_classifier(ClassifierModel("teacher", network, CLASSES), folder, {})
    return f"local-dir:{folder}"


def weights_of(out: Path) -> bytes:
    """The bytes of a result's weights."""
    return (out / "model.safetensors").read_bytes()
