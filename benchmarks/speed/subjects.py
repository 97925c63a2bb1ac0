"""The models that the benchmarks attack, each as two programs: vlmdefend's classifier and plain open_clip."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmdefend.data.transforms import PixelTransform
from vlmdefend.models import load_model
from vlmdefend.models.clip.folder import save_folder
from vlmdefend.models.clip.vision_language import VisionLanguageModel
from vlmdefend.models.zero_shot.classifier import ZeroShotClassifier

CLASSES = 1000


class Wrapped(nn.Module):
    """Plain open_clip as a user hands it to torchattacks: normalise, encode, normalise, scale, text matrix."""

    text: Tensor  # (C, D)
    mean: Tensor  # (3, 1, 1)
    std: Tensor  # (3, 1, 1)

    def __init__(self, clip: Any, text: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.clip: Any = clip
        self.scale = float(clip.logit_scale.detach().exp())  # the model's own: cross-entropy feels it
        self.register_buffer("text", text)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, C)."""
        features = self.clip.encode_image((images - self.mean) / self.std)
        return self.scale * F.normalize(features, dim=-1) @ self.text.T


@dataclass
class Subject:
    """One model with a batch to attack."""

    name: str
    ours: ZeroShotClassifier
    plain: Wrapped
    images: Tensor  # (B, 3, H, W) in [0, 1]
    labels: Tensor  # (B,)


def fixed_subjects() -> list[Subject]:
    """tiny-vit, and two public architectures with random weights, each with a random batch and 1000 classes."""
    return [
        _subject("tiny-vit", 64, load_model("tiny-vit", device="cpu")),
        _subject("ViT-B/32", 8, _random_weights("ViT-B-32")),
        _subject("RN50", 4, _random_weights("RN50")),
    ]


def as_plain(model: VisionLanguageModel, text: Tensor) -> Wrapped:
    """The same weights, written as a folder and read by plain open_clip; parameters want gradients, as is usual."""
    with tempfile.TemporaryDirectory() as folder:
        saved = save_folder(model, f"{folder}/model", {})
        clip = open_clip.create_model(f"local-dir:{saved}")
    return Wrapped(clip, text, model.mean, model.std).eval()


def pixels_of(model: VisionLanguageModel) -> PixelTransform:
    """The transform of vlmdefend's default protocol: images resized before the attack."""
    return PixelTransform(model.image_size, model.interpolation)


def _random_weights(architecture: str) -> VisionLanguageModel:
    torch.manual_seed(0)
    clip = open_clip.create_model(architecture)
    return VisionLanguageModel(
        architecture, clip, open_clip.get_tokenizer(architecture), open_clip.get_model_config(architecture), "cpu"
    )


def _subject(name: str, batch: int, model: VisionLanguageModel) -> Subject:
    rng = torch.Generator().manual_seed(0)
    width = int(model.model_cfg["embed_dim"])
    text = F.normalize(torch.randn(CLASSES, width, generator=rng), dim=1)
    images = torch.rand(batch, 3, model.image_size, model.image_size, generator=rng)
    labels = torch.randint(CLASSES, (batch,), generator=rng)
    ours = ZeroShotClassifier(
        copy.deepcopy(model.clip), text, mean=model.mean, std=model.std, image_size=model.image_size
    )
    return Subject(f"{name}, batch {batch}", ours, as_plain(model, text), images, labels)
