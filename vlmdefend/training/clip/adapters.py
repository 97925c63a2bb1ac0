"""Adapters that train in place of the weights and can be folded into them: LoRA and a visual prompt.

Both are torch parametrizations: the weight is computed from the trained parameters at every read, so attack, update
and measurement all use it, and :func:`folded` returns the weights of a plain model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from vlmdefend.errors import UserError
from vlmdefend.models.zero_shot.classifier import ZeroShotClassifier
from vlmdefend.training.clip.classifier import TrainedClassifier

LORA_ALPHA = 1.0


class LowRank(nn.Module):
    """LoRA parametrization of a weight: ``W + B A / sqrt(r)`` for each block of W (blocks x out, in); B starts at 0.

    The square root follows the code of CLIP-LoRA and keeps the size of an update the same at every rank
    (Kalajdzievski 2023). The package peft cannot be used: its attention layer has one pair of factors for query, key
    and value together, and refuses dropout.

    Args:
        weight: (blocks x out, in), frozen.
        blocks: number of blocks with factors of their own: 3 where query, key and value are stacked in one weight.
        rank: r.
        dropout: share of the inputs of B A that are zeroed in the training forward. The mask is part of the weight and
            so the same for every token of every image: fewer draws than in CLIP-LoRA, with the same mean.
        generator: draws the start of A and the seed of the dropout masks, which depend on the step.
    """

    def __init__(self, weight: Tensor, blocks: int, rank: int, dropout: float, generator: torch.Generator) -> None:
        super().__init__()
        rows, width = weight.shape
        bound = 1 / math.sqrt(width)  # as in torch's linear layers, which LoRA's initialization follows
        start = torch.rand(blocks, rank, width, generator=generator) * 2 * bound - bound
        self.down = nn.Parameter(start.to(weight.device))
        self.up = nn.Parameter(torch.zeros(blocks, rows // blocks, rank, device=weight.device))
        self.dropout, self.seed = dropout, int(torch.randint(2**31, (), generator=generator))
        self._kept: Tensor | None = None

    def forward(self, weight: Tensor) -> Tensor:
        """Returns the adapted weight, of the shape of ``weight``."""
        down = self.down if self._kept is None else self.down * self._kept
        return weight + (LORA_ALPHA / math.sqrt(down.shape[1])) * (self.up @ down).flatten(0, 1)

    def drop(self, step: int | None) -> None:
        """Draws the dropout mask of a step, another one for every step and block; None: turns dropout off."""
        if step is None or not self.dropout:
            self._kept = None
            return
        generator = torch.Generator().manual_seed(self.seed * 2**31 + step)
        kept = torch.rand(len(self.down), 1, self.down.shape[2], generator=generator) >= self.dropout
        self._kept = (kept / (1 - self.dropout)).to(self.down.device)


@contextmanager
def dropped_out(model: nn.Module, step: int) -> Iterator[None]:
    """Turns on the dropout of a model's LoRA layers inside the block; the same step gives the same bits."""
    layers = [module for module in model.modules() if isinstance(module, LowRank)]
    for layer in layers:
        layer.drop(step)
    try:
        yield
    finally:
        for layer in layers:
            layer.drop(None)


class BorderPrompt(nn.Module):
    """Visual prompt: a learned border on the normalised image, added as a parametrization of the positional embedding.

    The patch convolution is linear and its patches do not overlap, so a constant added to every image adds a constant
    to the embedding of every patch, exactly as the positional embedding does.

    Args:
        convolution: the patch convolution of a vision transformer.
        side: pixels of the square image.
        width: of the border, in pixels.
    """

    def __init__(self, convolution: nn.Module, side: int, width: int) -> None:
        super().__init__()
        weight: Any = convolution.weight
        self.border = nn.Parameter(torch.zeros(1, 3, side, side, device=weight.device))
        mask = torch.ones(1, 1, side, side, device=weight.device)
        mask[..., width : side - width, width : side - width] = 0
        self._convolution_and_mask = (convolution, mask)  # in a tuple: not registered as a submodule a second time

    def forward(self, positions: Tensor) -> Tensor:
        """Returns the (1 + N, W) positional embedding with the border's patch embeddings added."""
        convolution, mask = self._convolution_and_mask
        weight: Any = convolution.weight
        patches = F.conv2d(self.border * mask, weight, stride=weight.shape[-2:])
        return positions + F.pad(patches.flatten(2)[0].T, (0, 0, 1, 0))


def choose_adapters(classifier: TrainedClassifier, parts: str, seed: int) -> dict[str, nn.Parameter] | None:
    """Adds the adapters named by ``parts`` to the towers and returns their parameters by name; None: no adapter's name.

    Args:
        classifier: all its own parameters are frozen.
        parts: ``lora:R``: rank R on query, key and value of every attention of the image tower; ``lora-all:R``: of both
            towers; ``lora:R:P``: with dropout P; ``prompt:N``: a border of N pixels.
        seed: of LoRA's start and dropout.

    Raises:
        UserError: a number out of range, or a tower that cannot take the adapter.
    """
    kind, _, numbers = parts.partition(":")
    if kind not in ("lora", "lora-all", "prompt"):
        return None
    count, _, dropout = numbers.partition(":")
    if not count.isdecimal() or int(count) < 1 or (dropout and kind == "prompt"):
        raise UserError(f"--trains {parts}: write {kind}: and a whole number from 1, such as {kind}:4.")
    before = set(dict(classifier.clip.named_parameters()))
    if kind == "prompt":
        _add_prompt(classifier, int(count), parts)
    else:
        classifier.trains_text = kind == "lora-all"
        towers = ("image", "text") if classifier.trains_text else ("image",)
        generator = torch.Generator().manual_seed(seed)
        for tower in towers:
            _add_lora(classifier.clip, tower, int(count), _read_dropout(parts, dropout), generator)
    named = dict(classifier.clip.named_parameters())
    ends = (".down", ".up", ".border")
    return {name: p for name, p in named.items() if name not in before and name.endswith(ends)}


@torch.no_grad()
def folded(clip: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Returns copies of the weights ``names`` of a plain model, with the adapters folded in."""
    return {name: attrgetter(name)(clip).detach().clone() for name in names}


def _read_dropout(parts: str, written: str) -> float:
    """Returns the dropout probability in [0, 1) that ``written`` gives; 0 if it is empty."""
    try:
        share = float(written or 0)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise UserError(
            f"--trains {parts}: the dropout after the rank must be a number from 0 to below 1, such as 0.25."
        )
    return share


def _add_lora(clip: nn.Module, tower: str, rank: int, dropout: float, generator: torch.Generator) -> None:
    """Registers :class:`LowRank` on every attention of the ``image`` or ``text`` tower."""
    found: list[tuple[nn.Module, str, int]] = []
    for name, module in clip.named_modules():
        if name.startswith("visual.") != (tower == "image"):
            continue
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            found.append((module, "in_proj_weight", 3))
        elif all(hasattr(module, f"{part}_proj") for part in "qkvc"):  # the attention pool of CLIP's ResNet
            found.extend((getattr(module, f"{part}_proj"), "weight", 1) for part in "qkv")
    if not found:
        raise UserError(f"--trains lora: this {tower} tower has no attention of CLIP's kind; train image instead.")
    for module, name, blocks in found:
        weight = getattr(module, name)
        largest = min(weight.shape[0] // blocks, weight.shape[1])
        if rank > largest:
            raise UserError(
                f"--trains lora: rank {rank} is more than {largest}, the width of the {tower} tower's attention; "
                "give a smaller one, such as lora:4."
            )
        register_parametrization(module, name, LowRank(weight, blocks, rank, dropout, generator))


def _add_prompt(classifier: ZeroShotClassifier, width: int, parts: str) -> None:
    """Registers :class:`BorderPrompt` on the positional embedding of the image tower."""
    from open_clip.transformer import VisionTransformer

    tower: Any = classifier.clip.visual
    if not isinstance(tower, VisionTransformer):
        raise UserError(
            f"--trains {parts}: a visual prompt is folded into the positional embedding of a vision transformer, and "
            "this image tower is another; choose a ViT, or --trains image."
        )
    if 2 * width >= classifier.image_size:
        raise UserError(
            f"--trains {parts}: the border covers all {classifier.image_size} x {classifier.image_size} pixels; give a "
            "narrower one."
        )
    register_parametrization(tower, "positional_embedding", BorderPrompt(tower.conv1, classifier.image_size, width))
