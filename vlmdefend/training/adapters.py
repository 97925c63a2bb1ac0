"""Few new parameters that train in the place of the weights, and can be folded into them: LoRA, a visual prompt.

Both are parametrizations: the weight is read as a function of what trains, so that the attack, the update and the
measurement all see it, and :func:`folded` gives a plain model's weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from vlmdefend.errors import UserError
from vlmdefend.models.zero_shot import ZeroShotClassifier

LORA_ALPHA = 1.0


class LowRank(nn.Module):
    """``W + (1 / r) B A`` for each of the blocks that W (blocks x out, in) consists of; B begins at 0."""

    def __init__(self, weight: Tensor, blocks: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        rows, width = weight.shape
        bound = math.sqrt(3.0 / width)  # Kaiming's for a linear layer, as LoRA begins
        start = torch.rand(blocks, rank, width, generator=generator) * 2 * bound - bound
        self.down = nn.Parameter(start.to(weight.device))
        self.up = nn.Parameter(torch.zeros(blocks, rows // blocks, rank, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that is read."""
        return weight + (LORA_ALPHA / self.down.shape[1]) * (self.up @ self.down).flatten(0, 1)


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


def choose_adapters(classifier: ZeroShotClassifier, parts: str, seed: int) -> dict[str, nn.Parameter] | None:
    """Put what ``parts`` says into the image tower and return its parameters by name; None for another word.

    Args:
        classifier: all its own parameters are frozen.
        parts: ``lora:R``: rank R on query, key and value of every attention of the image tower; ``prompt:P``: a border
            of P pixels.
        seed: of LoRA's start.

    Raises:
        UserError: R or P is no number that fits, or the tower has no place for it.
    """
    kind, _, count = parts.partition(":")
    if kind not in ("lora", "prompt"):
        return None
    if not count.isdecimal() or int(count) < 1:
        raise UserError(f"--trains {parts}: write {kind}: and a whole number from 1, such as {kind}:4.")
    before = set(dict(classifier.clip.named_parameters()))
    if kind == "lora":
        _add_lora(classifier.clip.visual, int(count), torch.Generator().manual_seed(seed))
    else:
        _add_prompt(classifier, int(count), parts)
    named = dict(classifier.clip.named_parameters())
    ends = (".down", ".up", ".border")
    return {name: p for name, p in named.items() if name not in before and name.endswith(ends)}


@torch.no_grad()
def folded(clip: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """The weights by a plain model's names, adapters worked into them."""
    return {name: attrgetter(name)(clip).detach().clone() for name in names}


def _add_lora(tower: nn.Module, rank: int, generator: torch.Generator) -> None:
    found: list[tuple[nn.Module, str, int]] = []
    for module in tower.modules():
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            found.append((module, "in_proj_weight", 3))
        elif all(hasattr(module, f"{part}_proj") for part in "qkvc"):  # the attention pool of CLIP's ResNet
            found.extend((getattr(module, f"{part}_proj"), "weight", 1) for part in "qkv")
    if not found:
        raise UserError("--trains lora: this image tower has no attention; train image instead.")
    for module, name, blocks in found:
        weight = getattr(module, name)
        register_parametrization(module, name, LowRank(weight, blocks, rank, generator))


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
