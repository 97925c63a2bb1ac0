"""Measure the embedded models: clean accuracy, accuracy under PGD-10, and on the other model's images.

The attack is a plain, self-contained PGD, so that the cards do not depend on the code that they are
shipped with.
"""

from __future__ import annotations

import json
import lzma
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from safetensors import safe_open
from torch import Tensor

from benchmarks.assets.packages import AssetError
from benchmarks.assets.pixels import ImageSet

STEPS = 10
BATCH = 100


@dataclass(frozen=True)
class Model:
    """A trained model, its tokenizer, and what its weight file says about its training."""

    name: str
    clip: Any
    tokenize: Any
    training: dict[str, Any]


@dataclass(frozen=True)
class Share:
    """How many of how many, with Wilson's 95 % interval."""

    hits: int
    count: int

    def interval(self) -> tuple[float, float]:
        """Wilson score interval at 95 %."""
        z, n, share = 1.959964, self.count, self.hits / self.count
        middle = share + z * z / (2 * n)
        spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
        return max(0.0, (middle - spread) / (1 + z * z / n)), min(1.0, (middle + spread) / (1 + z * z / n))

    def __str__(self) -> str:
        low, high = self.interval()
        return f"{100 * self.hits / self.count:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def load_model(folder: Path) -> Model:
    """A model from its compressed file, loaded by plain open_clip from a temporary folder."""
    if not (folder / "open_clip_model.safetensors.xz").exists():
        raise AssetError(f"'{folder}' holds no trained model: run 'make_assets.py models' first.")
    with tempfile.TemporaryDirectory() as temporary:
        weights = Path(temporary) / "open_clip_model.safetensors"
        weights.write_bytes(lzma.decompress((folder / "open_clip_model.safetensors.xz").read_bytes()))
        config = (folder / "open_clip_config.json").read_text(encoding="utf-8")
        (Path(temporary) / "open_clip_config.json").write_text(config, encoding="utf-8")
        clip, _, _ = open_clip.create_model_and_transforms(f"local-dir:{temporary}")
        tokenize = open_clip.get_tokenizer(f"local-dir:{temporary}")
        with safe_open(weights, "pt") as file:
            training = json.loads(file.metadata()["training"])
    return Model(folder.name, clip.eval().requires_grad_(False), tokenize, training)


class ZeroShot:
    """Pixels in [0, 1] -> logits over the classes of one set, text features averaged over its templates."""

    def __init__(self, model: Model, images: ImageSet) -> None:
        self.clip = model.clip
        self.mean = torch.tensor(OPENAI_DATASET_MEAN).view(1, 3, 1, 1)
        self.deviation = torch.tensor(OPENAI_DATASET_STD).view(1, 3, 1, 1)
        texts = [template.format(c=name) for template in images.templates for name in images.classnames]
        features = self.clip.encode_text(model.tokenize(texts), normalize=True)
        mean = features.view(len(images.templates), len(images.classnames), -1).mean(0)
        self.weights = self.clip.logit_scale.exp() * F.normalize(mean, dim=-1).T  # (D, classes)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Logits (B, classes) of pixels (B, 3, 32, 32) in [0, 1], logit scale applied."""
        features = self.clip.encode_image((pixels - self.mean) / self.deviation, normalize=True)
        logits: Tensor = features @ self.weights
        return logits


@torch.no_grad()
def correct(classify: ZeroShot, pixels: Tensor, labels: Tensor) -> Share:
    """How many of `pixels` (N, 3, 32, 32) in [0, 1] are classified as labelled."""
    parts = zip(pixels.split(BATCH), labels.split(BATCH), strict=True)
    return Share(sum(int((classify(x).argmax(1) == y).sum()) for x, y in parts), len(labels))


def attack(classify: ZeroShot, pixels: Tensor, labels: Tensor, eps: float, seed: int) -> Tensor:
    """PGD-10 in the L_inf ball: uniform start, step eps / 4, summed cross-entropy, the best of all iterates."""
    generator = torch.Generator().manual_seed(seed)
    parts = zip(pixels.split(BATCH), labels.split(BATCH), strict=True)
    return torch.cat([attack_batch(classify, x, y, eps, generator) for x, y in parts])


def attack_batch(classify: ZeroShot, pixels: Tensor, labels: Tensor, eps: float, generator: torch.Generator) -> Tensor:
    """One batch of `attack`; best = the largest margin of a wrong class over the true one."""
    noise = torch.rand(pixels.shape, generator=generator) * 2 - 1
    current = (pixels + eps * noise).clamp(0, 1)
    best, best_margin = pixels, torch.full((len(labels),), -math.inf)
    for step in range(STEPS + 1):
        current.requires_grad_()
        logits = classify(current)
        margin = wrong_margin(logits.detach(), labels)
        better = margin > best_margin
        best = torch.where(better.view(-1, 1, 1, 1), current.detach(), best)
        best_margin = torch.where(better, margin, best_margin)
        if step < STEPS:
            loss = F.cross_entropy(logits, labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, current)
            moved = current.detach() + eps / 4 * gradient.sign()
            current = moved.clamp(pixels - eps, pixels + eps).clamp(0, 1)
    return best


def wrong_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Largest wrong logit less the true one (B,): above zero where the prediction is wrong."""
    true = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], -math.inf)
    return (others.amax(1, keepdim=True) - true).squeeze(1)


def balanced(labels: Tensor, count: int) -> Tensor:
    """Places of the first `count` samples in which every class has its equal share."""
    classes = labels.unique()
    places = [(labels == label).nonzero().squeeze(1)[: count // len(classes)] for label in classes]
    return torch.cat(places).sort().values
