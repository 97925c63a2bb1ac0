"""A linear classifier on sixteen small pictures, evaluated with any attack and defense."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.evaluation.saved_sets import craft
from vlmdefend.attacks.base import Attack
from vlmdefend.attacks.gradient.pgd import Pgd
from vlmdefend.data.base import BadImage, ImageSet
from vlmdefend.data.transforms import PixelTransform
from vlmdefend.defenses.base import Defense, Paradigm, Recipe
from vlmdefend.defenses.none import NoDefense
from vlmdefend.evaluation.cell.evaluator import CellEvaluator
from vlmdefend.evaluation.store.records import Cell, ImageRow, Record
from vlmdefend.evaluation.store.run_folder import CellWriter, Store
from vlmdefend.progress import Progress
from vlmdefend.rng import ImageRng
from vlmdefend.types import Outputs, Pipeline

COUNT, SIZE, CLASSES = 16, 6, 3

FIELDS: dict[str, Any] = {
    "protocol": "unified",
    "protocol_hash": "p",
    "model": "linear",
    "weights_hash": "w",
    "defense": "none",
    "defense_config": {},
    "dataset": "toy",
    "split": "test",
    "ids_hash": "i",
    "n": COUNT,
    "prompts_hash": "t",
    "attack": "pgd",
    "attack_config": {},
    "attacker": "whitebox",
    "norm": "linf",
    "eps": 8 / 255,
    "seed": 0,
    "batch_size": 4,
    "shard_size": 8,
    "device": "cpu",
}


def cell(**fields: Any) -> Cell:
    return Cell(**{**FIELDS, **fields})


class Linear:
    """Logits are linear in the pixels."""

    num_classes = CLASSES
    stochastic = False

    def __init__(self) -> None:
        self.weight = torch.randn(CLASSES, 3 * SIZE * SIZE, generator=torch.Generator().manual_seed(0))

    def __call__(self, images: Tensor, rng: ImageRng) -> Outputs:
        features = images.flatten(1) - 0.5
        return Outputs(features @ self.weight.T, features)


def pictures(model: Linear, bad: tuple[int, ...] = ()) -> ImageSet:
    """Every fourth label is wrong on purpose."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (COUNT, SIZE, SIZE, 3), generator=generator, dtype=torch.uint8)
    images = pixels.permute(0, 3, 1, 2).float() / 255
    right = model(images, ImageRng(0, [""] * COUNT)).logits.argmax(dim=1).tolist()

    def read(i: int) -> Image.Image:
        if i in bad:
            raise BadImage(f"image-{i:02d}: broken; replace the file.")
        return Image.fromarray(pixels[i].numpy())

    return ImageSet(
        name="toy",
        split="test",
        class_names=("a", "b", "c"),
        templates=("a {c}.",),
        ids=tuple(f"image-{i:02d}" for i in range(COUNT)),
        labels=tuple(label if i % 4 else (label + 1) % CLASSES for i, label in enumerate(right)),
        read=read,
    )


@dataclass(frozen=True, kw_only=True)
class Around(Defense):
    """Any function of (model, images, rng) as a defense."""

    name: ClassVar[str] = "around"
    paradigm: ClassVar[Paradigm] = "training-free"
    summary: ClassVar[str] = "a test's own"
    citation: ClassVar[str] = "–"
    recipe: ClassVar[Recipe] = Recipe("exact")
    call: Callable[[Pipeline, Tensor, ImageRng], Outputs]

    def wrap(self, model: Pipeline) -> Pipeline:
        return Called(model, self.call, type(self).stochastic)


class Random(Around):
    """The same, and it says that it draws."""

    stochastic: ClassVar[bool] = True


class Called:
    def __init__(self, model: Pipeline, call: Callable[..., Outputs], stochastic: bool) -> None:
        self.model, self.call, self.num_classes, self.stochastic = model, call, model.num_classes, stochastic

    def __call__(self, images: Tensor, rng: ImageRng) -> Outputs:
        return self.call(self.model, images, rng)


class Notes(Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.images = 0

    def note(self, message: str) -> None:
        self.notes.append(message)

    def advance(self, unit: Any, count: int = 1) -> None:
        self.images += count


@contextmanager
def bench(folder: Path, *, bad: tuple[int, ...] = (), skip_bad: bool = False, **fields: Any) -> Iterator[Any]:
    """Returns a cell evaluator and the writer of its cell."""
    model = Linear()
    attack: Attack = fields.pop("attack", Pgd())
    defense: Defense = fields.pop("defense", NoDefense())
    chosen = cell(attack=attack.name, defense=defense.name, **fields)
    evaluator = CellEvaluator(
        cell=chosen,
        model=model,
        defense=defense,
        attack=attack,
        images=pictures(model, bad),
        transform=PixelTransform(None, "bicubic"),
        device=torch.device("cpu"),
        skip_bad=skip_bad,
    )
    with Store(folder).writing(chosen) as writer:
        yield evaluator, writer


Verdict = Callable[..., tuple[Record, list[ImageRow]]]


@pytest.fixture
def progress() -> Notes:
    return Notes()


@pytest.fixture
def verdict(tmp_path: Path, progress: Notes) -> Verdict:
    """``verdict(attack=..., defense=..., eps=...)`` -> the record and its rows, computed anew at each call."""
    calls = iter(range(1000))

    def judged(**options: Any) -> tuple[Record, list[ImageRow]]:
        with bench(tmp_path / str(next(calls)), **options) as (evaluator, writer):
            return evaluator.run(writer, progress)  # type: ignore[no-any-return]

    return judged


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sets of adversarial images of both embedded models, never changed."""
    folder = tmp_path_factory.mktemp("sets")
    for model in ("tiny-vit", "tiny-rn"):
        craft(folder / model, png=True, model=model)
    return folder


__all__ = ["COUNT", "Around", "CellWriter", "Notes", "Random", "Verdict", "bench", "cell"]
