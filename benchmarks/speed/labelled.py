"""Images of `fashion` that a tiny model classifies correctly, on which attacks are measured, and query counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.quality.robust_model import robust_model
from benchmarks.speed.subjects import Wrapped, as_plain, pixels_of
from vlmdefend.attacks.view import View
from vlmdefend.data import load_dataset
from vlmdefend.data.loader import load_batch
from vlmdefend.evaluation.grid.protocol import get_protocol
from vlmdefend.models import load_model
from vlmdefend.models.clip.vision_language import VisionLanguageModel
from vlmdefend.models.zero_shot.classifier import ZeroShotClassifier
from vlmdefend.rng import ImageRng

BATCH = 64


@dataclass
class Labelled:
    """A model, as vlmdefend's classifier and as plain open_clip, and images that both get right."""

    name: str
    ours: ZeroShotClassifier
    plain: Wrapped
    images: Tensor  # (N, 3, H, W) in [0, 1]
    labels: Tensor  # (N,)

    @property
    def ids(self) -> list[str]:
        """A name per image."""
        return [f"image-{i}" for i in range(len(self.images))]

    def view(self, *, stop: bool = True) -> View:
        """Ours as an attack sees it."""
        return View(self.ours, ImageRng(0, self.ids), width=BATCH, stop=stop)


def labelled(which: str, count: int) -> Labelled:
    """The first images, of ``count`` class-balanced ones, that the model ``undefended`` or ``robust`` gets right."""
    model: VisionLanguageModel = robust_model() if which == "robust" else load_model("tiny-vit", device="cpu")
    images = load_dataset("fashion", limit=count)
    batch, _ = load_batch(images, range(count), pixels_of(model), skip_bad=False)
    templates = tuple(get_protocol("unified").templates)
    ours = model.zero_shot(images.class_names, templates)
    plain = as_plain(model, model.text_features(images.class_names, templates)).requires_grad_(False)
    with torch.no_grad():
        right = (ours(batch.images).logits.argmax(1) == batch.labels) & (plain(batch.images).argmax(1) == batch.labels)
    return Labelled(f"tiny-vit, {which}", ours, plain, batch.images[right], batch.labels[right])


class Asked(nn.Module):
    """Counts the images in the forward passes of a plain model, and those whose gradient is computed."""

    def __init__(self, model: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.forwards = self.backwards = 0

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C)."""
        self.forwards += len(images)
        self.backwards += len(images) if images.requires_grad and torch.is_grad_enabled() else 0
        return self.model(images)
