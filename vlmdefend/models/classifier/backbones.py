"""Image networks from pixels to features, on which a classifier with a head is built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

import torch
from torch import nn

from vlmdefend.errors import UserError
from vlmdefend.models.classifier.timm_network import load_timm, rebuild_timm

TIMM = "timm:"
TINY_CNN = "tiny-cnn"
Made = TypeVar("Made")
Interpolation = Literal["bicubic", "bilinear"]


@dataclass(frozen=True)
class Backbone:
    """An image network with its feature width and its preprocessing."""

    network: nn.Module  # (B, 3, S, S) normalised -> (B, width)
    width: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Interpolation
    config: dict[str, Any]  # JSON: what builds the network again
    pretrained: bool


class TinyCnn(nn.Sequential):
    """Three convolutions with BatchNorm for images of 28 pixels; random weights, trained on no data set."""

    width = 576

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for inputs, outputs in ((3, 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            layers.append(nn.MaxPool2d(2))
        super().__init__(*layers, nn.Flatten())


def rebuild(config: dict[str, Any]) -> nn.Module:
    """Builds the network of a saved configuration; its weights are loaded afterwards.

    Raises:
        UserError: a configuration that this version cannot build.
    """
    kind = config.get("kind")
    if kind == "tiny-cnn":
        return seeded(0, TinyCnn)
    if kind == "timm":
        return seeded(0, lambda: rebuild_timm(config))
    if kind == "open_clip":
        return seeded(0, lambda: open_clip_tower(config))
    raise UserError(f"a backbone of kind {kind!r} is not known to this version; upgrade vlmdefend.")


def tiny_cnn() -> Backbone:
    """The small convolutional network with random weights."""
    half = (0.5, 0.5, 0.5)
    return Backbone(TinyCnn(), TinyCnn.width, 28, half, half, "bicubic", {"kind": "tiny-cnn"}, False)


def timm_backbone(name: str, pretrained: bool) -> Backbone:
    """The timm network called ``timm:NAME``."""
    found = load_timm(name.removeprefix(TIMM), pretrained=pretrained)
    return Backbone(
        found.network,
        found.width,
        found.image_size,
        found.mean,
        found.std,
        found.interpolation,
        found.config,
        pretrained,
    )


def open_clip_tower(config: dict[str, Any]) -> nn.Module:
    """The image tower of an open_clip configuration, with random weights."""
    from vlmdefend.models.clip.build import untrained
    from vlmdefend.models.clip.contiguous import use_contiguous_attention

    clip = untrained({"model_cfg": config["model_cfg"], "preprocess_cfg": config["preprocess_cfg"]})
    use_contiguous_attention(clip)
    return cast(nn.Module, clip.visual)


def seeded(seed: int, make: Callable[[], Made]) -> Made:
    """Returns what ``make`` builds, its random weights drawn from ``seed``; the global random state is restored."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()
