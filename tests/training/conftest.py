"""Two random CLIPs of different architecture and width, small enough that a run of them takes a second."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.training.adaptation.domains import saved_teacher, write_domains
from vlmdefend.data.base import ImageSet
from vlmdefend.data.transforms import PixelTransform
from vlmdefend.defenses.training_time import OBJECTIVES
from vlmdefend.defenses.training_time.hpt_gpd import HptGpd
from vlmdefend.models import load_model
from vlmdefend.models.clip.vision_language import VisionLanguageModel
from vlmdefend.progress import Progress
from vlmdefend.training.clip.classifier import TrainedClassifier, choose_trained
from vlmdefend.training.clip.held_out import accuracies
from vlmdefend.training.clip.prompts import choose_prompts
from vlmdefend.training.clip.student import AutocastTeacher, ClipStudent
from vlmdefend.training.loop.data import TrainingImages
from vlmdefend.training.loop.processes import Processes
from vlmdefend.training.loop.stage import Optimization, Stage
from vlmdefend.training.loop.trainer import Trainer
from vlmdefend.types import Batch

SIZE = 32
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
VIT = {"image_size": SIZE, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
RESNET = {"image_size": SIZE, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32}
CONFIGS: dict[str, dict[str, Any]] = {
    "rn": {"embed_dim": 32, "vision_cfg": RESNET, "text_cfg": TEXT},
    "vit": {"embed_dim": 48, "vision_cfg": VIT, "text_cfg": TEXT},
}
PREPROCESS = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3], "interpolation": "bicubic", "resize_mode": "shortest"}
CLASSES = ("cat", "dog", "car", "ship", "tree", "house")
TEMPLATES = ("a photo of a {c}.",)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Kind -> a model folder that no test changes."""
    root = tmp_path_factory.mktemp("models")
    for seed, (kind, config) in enumerate(CONFIGS.items()):
        folder = root / kind
        folder.mkdir()
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": PREPROCESS}))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            clip = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
            state = clip.state_dict()
            for name in state:
                if name.endswith("running_mean"):
                    state[name].uniform_(-0.1, 0.1)
                elif name.endswith(("running_var", "bn3.weight")):
                    state[name].uniform_(0.5, 1.5)
        save_file({k: v.contiguous() for k, v in state.items()}, folder / "open_clip_model.safetensors")
    return {kind: root / kind for kind in CONFIGS}


@pytest.fixture
def target(folders: dict[str, Path]) -> VisionLanguageModel:
    return load_model(f"local-dir:{folders['rn']}", device="cpu")


@pytest.fixture
def proxy(folders: dict[str, Path]) -> VisionLanguageModel:
    return load_model(f"local-dir:{folders['vit']}", device="cpu")


def classifier(model: VisionLanguageModel, **options: Any) -> TrainedClassifier:
    return TrainedClassifier(model, CLASSES, TEMPLATES, **options)


def student_of(model: VisionLanguageModel, trains: str = "image", precision: Any = None, **options: Any):
    made = classifier(model, **options)
    parameters = choose_prompts(made, trains, seed=0) or choose_trained(made, trains)
    return ClipStudent(made, parameters, Processes("cpu", precision))


def parts_of(name: str) -> str:
    """What the objective of that name trains, as small as it can be."""
    learns = OBJECTIVES.get(name).learns
    return f"{learns[0]}:2" if learns else "image"


def image_set(count: int) -> ImageSet:
    """Noise with labels that take turns."""
    levels = torch.randint(0, 256, (count, SIZE, SIZE, 3), generator=torch.Generator().manual_seed(5)).to(torch.uint8)
    return ImageSet(
        name="noise",
        split="train",
        class_names=CLASSES,
        templates=TEMPLATES,
        ids=tuple(f"image-{i}" for i in range(count)),
        labels=tuple(i % len(CLASSES) for i in range(count)),
        read=lambda i: Image.fromarray(levels[i].numpy()),
    )


def batch_of(count: int) -> Batch:
    return TrainingImages(image_set(count), PixelTransform(SIZE)).batch(range(count))


EPS = 8 / 255


def stages(**changes: Any) -> list[Stage]:
    """Two epochs each; ``changes`` go into both objectives."""
    options = {"eps": EPS, "alpha": EPS} | changes
    return [
        Stage(name="a", objective=HptGpd(anchored=True, **options), epochs=2, rate=0.01, ema=0.9),
        Stage(name="b", objective=HptGpd(**options), epochs=2, rate=0.05, pull=0.5),
    ]


@dataclass
class Stopper(Progress):
    """Breaks off after a step, as a kill does: nothing is saved on the way out."""

    at: int | None = None
    lines: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def advance(self, unit: Any, count: int = 1) -> None:
        self.lines.append(unit)
        if unit["step"] == self.at:
            raise KeyboardInterrupt

    def note(self, message: str) -> None:
        self.notes.append(message)


MakeRun = Callable[..., Trainer]


@pytest.fixture
def make_run(folders: dict[str, Path], tmp_path: Path) -> MakeRun:
    """``make_run("folder", plan=..., clip=...)``: see :func:`build_run`."""
    return lambda name="run", **options: build_run(folders, tmp_path / name, **options)


def build_run(
    folders: dict[str, Path],
    folder: Path,
    *,
    plan: list[Stage] | None = None,
    at: int | None = None,
    trains: str = "image",
    batch_norm: Any = "frozen",
    precision: Any = None,
    images: int = 20,
    save_every: int | None = 2,
    pivot: Any = None,
    judged: bool = False,
    **options: Any,
) -> Trainer:
    """A run of 20 images in batches of 8 (the last has 4) that breaks off after step ``at``."""
    target = load_model(f"local-dir:{folders['rn']}", device="cpu")
    proxy = load_model(f"local-dir:{folders['vit']}", device="cpu")
    student = student_of(target, trains, precision, batch_norm=batch_norm)
    folder.mkdir(exist_ok=True)
    measure = partial(accuracies, target.zero_shot(CLASSES, TEMPLATES), batch_of(7), EPS, 0, student.processes)
    return Trainer(
        student,
        AutocastTeacher(classifier(proxy), student.processes),
        TrainingImages(image_set(images), PixelTransform(SIZE), threads=1),
        stages() if plan is None else plan,
        Optimization(**({"batch_size": 8, "clip": 1.0} | options)),
        folder,
        measure=measure if judged else None,
        progress=Stopper(at),
        save_every=save_every,
        pivot=pivot,
    )


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two domains that no test changes."""
    return write_domains(tmp_path_factory.mktemp("domains"))


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The name of a classifier of their classes."""
    return saved_teacher(tmp_path_factory.mktemp("teacher"))
