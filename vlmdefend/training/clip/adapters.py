"""Few new parameters that train in the place of the weights, and can be folded into them: LoRA, a visual prompt.

Both are parametrizations: the weight is read as a function of what trains, so that the attack, the update and the
measurement all see it, and :func:`folded` gives a plain model's weights.
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
from vlmdefend.models.clip.zero_shot import ZeroShotClassifier
from vlmdefend.training.clip.classifier import TrainedClassifier

LORA_ALPHA = 1.0


class LowRank(nn.Module):
    """``W + B A / sqrt(r)`` for each of the blocks that W (blocks x out, in) consists of; B begins at 0.

    The root is what CLIP-LoRA's code has, and what keeps the size of an update the same at every rank (Kalajdzievski
    2023). The package peft would not serve: its attention layer has one pair of factors for query, key and value
    together, and refuses dropout.

    Args:
        dropout: share of the inputs that B A does not see in the forward that is trained. A weight is the same for
            every token of every image, and so is what is left out: fewer draws than CLIP-LoRA's, of the same mean.
        generator: of the start; also what dropout is drawn from, as a function of the step.
    """

    def __init__(self, weight: Tensor, blocks: int, rank: int, dropout: float, generator: torch.Generator) -> None:
        super().__init__()
        rows, width = weight.shape
        bound = 1 / math.sqrt(width)  # that of torch's linear layers, as LoRA begins
        start = torch.rand(blocks, rank, width, generator=generator) * 2 * bound - bound
        self.down = nn.Parameter(start.to(weight.device))
        self.up = nn.Parameter(torch.zeros(blocks, rows // blocks, rank, device=weight.device))
        self.dropout, self.seed = dropout, int(torch.randint(2**31, (), generator=generator))
        self._kept: Tensor | None = None

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that is read."""
        down = self.down if self._kept is None else self.down * self._kept
        return weight + (LORA_ALPHA / math.sqrt(down.shape[1])) * (self.up @ down).flatten(0, 1)

    def drop(self, step: int | None) -> None:
        """Leave out inputs, other ones at every step and for every block; None: none."""
        if step is None or not self.dropout:
            self._kept = None
            return
        generator = torch.Generator().manual_seed(self.seed * 2**31 + step)
        kept = torch.rand(len(self.down), 1, self.down.shape[2], generator=generator) >= self.dropout
        self._kept = (kept / (1 - self.dropout)).to(self.down.device)


@contextmanager
def dropped_out(model: nn.Module, step: int) -> Iterator[None]:
    """LoRA's dropout inside, where a model has such layers; the same bits for the same step."""
    layers = [module for module in model.modules() if isinstance(module, LowRank)]
    for layer in layers:
        layer.drop(step)
    try:
        yield
    finally:
        for layer in layers:
            layer.drop(None)


class BorderPrompt(nn.Module):
    """A learned border on the normalised image, as what the patches' convolution makes of it.

    The convolution is linear and its patches do not overlap, so a constant added to every image adds a constant to
    every patch's embedding: exactly what the positional embedding does.
    """

    def __init__(self, convolution: nn.Module, side: int, width: int) -> None:
        super().__init__()
        weight: Any = convolution.weight
        self.border = nn.Parameter(torch.zeros(1, 3, side, side, device=weight.device))
        mask = torch.ones(1, 1, side, side, device=weight.device)
        mask[..., width : side - width, width : side - width] = 0
        self._of = (convolution, mask)  # in a tuple: the convolution stays the tower's

    def forward(self, positions: Tensor) -> Tensor:
        """(1 + N, W) positional embedding that is read."""
        convolution, mask = self._of
        weight: Any = convolution.weight
        patches = F.conv2d(self.border * mask, weight, stride=weight.shape[-2:])
        return positions + F.pad(patches.flatten(2)[0].T, (0, 0, 1, 0))


def choose_adapters(classifier: TrainedClassifier, parts: str, seed: int) -> dict[str, nn.Parameter] | None:
    """Put what ``parts`` says into the towers and return its parameters by name; None for another word.

    Args:
        classifier: all its own parameters are frozen.
        parts: ``lora:R``: rank R on query, key and value of every attention of the image tower; ``lora-all:R``: of both
            towers; ``lora:R:P``: with dropout P; ``prompt:N``: a border of N pixels.
        seed: of LoRA's start and dropout.

    Raises:
        UserError: a number that does not fit, or a tower that has no place for it.
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
            _add_lora(classifier.clip, tower, int(count), _dropout(parts, dropout), generator)
    named = dict(classifier.clip.named_parameters())
    ends = (".down", ".up", ".border")
    return {name: p for name, p in named.items() if name not in before and name.endswith(ends)}


@torch.no_grad()
def folded(clip: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """The weights by a plain model's names, adapters worked into them."""
    return {name: attrgetter(name)(clip).detach().clone() for name in names}


def _dropout(parts: str, written: str) -> float:
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
                f"--trains lora: rank {rank} is more than the {largest} that the {tower} tower's attention is wide; "
                "give a smaller one, such as lora:4."
            )
        register_parametrization(module, name, LowRank(weight, blocks, rank, dropout, generator))


def _add_prompt(classifier: ZeroShotClassifier, width: int, parts: str) -> None:
    from open_clip.transformer import VisionTransformer

    tower: Any = classifier.clip.visual
    if not isinstance(tower, VisionTransformer):
        raise UserError(
            f"--trains {parts}: a visual prompt is folded into the positional embedding of a vision transformer, and "
            "this image tower is another; choose a ViT, or --trains image."
        )
    if 2 * width >= classifier.image_size:
        raise UserError(f"--trains {parts}: leaves nothing of {classifier.image_size} pixels; give a narrower border.")
    register_parametrization(tower, "positional_embedding", BorderPrompt(tower.conv1, classifier.image_size, width))
