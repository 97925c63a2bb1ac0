"""Image networks from pixels to features, by name: what a classifier with a head is built on."""

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
    """An image network, and how it wants its pixels."""

    network: nn.Module  # (B, 3, S, S) normalised -> (B, width)
    width: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Interpolation
    config: dict[str, Any]  # JSON: what builds the network again
    pretrained: bool


class TinyCnn(nn.Sequential):
    """Three convolutions with BatchNorm for images of 28 pixels; random weights: it has seen no data set."""

    width = 576

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for inputs, outputs in ((3, 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            layers.append(nn.MaxPool2d(2))
        super().__init__(*layers, nn.Flatten())


def load_backbone(name: str, *, pretrained: bool = True, seed: int = 0) -> Backbone:
    """The image network called ``name``, on the CPU, in evaluation mode.

    Args:
        name: ``tiny-cnn``; ``timm:NAME``, ``timm:NAME@FILE`` or ``timm:local-dir:FOLDER`` of timm; or any name of a
            CLIP, whose image tower is taken.
        pretrained: with its published weights; ``tiny-cnn`` has none.
        seed: of the weights where they are random. The global random state is left as it was.

    Raises:
        UnknownName: with the nearest names.
        UserError: weights that cannot be had.
    """
    if name == TINY_CNN:
        return _seeded(seed, _tiny_cnn)
    if name.startswith(TIMM):
        return _seeded(seed, lambda: _timm(name, pretrained))
    from vlmdefend.models.names import load_model

    model = load_model(name, device="cpu")
    if getattr(model, "class_names", None) is not None:
        raise UserError(f"{name} is a classifier with a head; give it as --teacher, or give a backbone without one.")
    if model.prompts is not None and model.prompts.visual_shape[0]:
        raise UserError(
            f"{name} has learned tokens inside of its image tower, which a backbone does not keep; give the model that "
            "they were learned on."
        )
    config = {"kind": "open_clip", "model_cfg": model.model_cfg, "preprocess_cfg": model.preprocess_cfg}
    tower = model.clip.visual if pretrained else _seeded(seed, lambda: _open_clip_tower(config))
    width = int(model.model_cfg["embed_dim"])
    return Backbone(tower, width, model.image_size, model.mean, model.std, model.interpolation, config, pretrained)


def rebuild(config: dict[str, Any]) -> nn.Module:
    """The network of a saved configuration, its weights yet to be loaded.

    Raises:
        UserError: a configuration that this version cannot build.
    """
    kind = config.get("kind")
    if kind == "tiny-cnn":
        return _seeded(0, TinyCnn)
    if kind == "timm":
        return _seeded(0, lambda: rebuild_timm(config))
    if kind == "open_clip":
        return _seeded(0, lambda: _open_clip_tower(config))
    raise UserError(f"a backbone of kind {kind!r} is not known to this version; upgrade vlmdefend.")


def _tiny_cnn() -> Backbone:
    half = (0.5, 0.5, 0.5)
    return Backbone(TinyCnn(), TinyCnn.width, 28, half, half, "bicubic", {"kind": "tiny-cnn"}, False)


def _timm(name: str, pretrained: bool) -> Backbone:
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


def _open_clip_tower(config: dict[str, Any]) -> nn.Module:
    from vlmdefend.models.clip.build import untrained
    from vlmdefend.models.clip.contiguous import use_contiguous_attention

    clip = untrained({"model_cfg": config["model_cfg"], "preprocess_cfg": config["preprocess_cfg"]})
    use_contiguous_attention(clip)
    return cast(nn.Module, clip.visual)


def _seeded(seed: int, make: Callable[[], Made]) -> Made:
    """What ``make`` builds, its random weights those of ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()
