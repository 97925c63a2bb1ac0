"""Deep tokens of which each image of a batch has its own, and the text tower as a function of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vlmdefend.errors import UserError
from vlmdefend.models.prompts.learned_prompts import LearnedPrompts, text_transformer
from vlmdefend.models.prompts.prompt_tower import PromptTower
from vlmdefend.models.zero_shot.text_side import TextSide
from vlmdefend.models.zero_shot.text_tower import read_short

SPREAD = 0.02  # of the tokens that a fresh image tower gets, as MaPLe's code starts them


class ImagePrompts(LearnedPrompts):
    """Learned prompts with separate vectors for each row of the batch.

    Args:
        visual: (D, B, N, V) tokens of the image tower's first D blocks for B images, or (D, N, V) for all.
        text: (D - 1, P, M, W) vectors of the second to the D-th block of the text tower for P prompts.
    """

    def __init__(self, *, visual: Tensor | None = None, text: Tensor | None = None) -> None:
        super().__init__()
        self.image_tokens, self.word_tokens = visual, text

    @property
    def visual_shape(self) -> tuple[int, int]:
        """The numbers (D, N): blocks with tokens and tokens per block; zeros if there are none."""
        return (0, 0) if self.image_tokens is None else (len(self.image_tokens), self.image_tokens.shape[-2])

    @property
    def text_depth(self) -> int:
        """D - 1: text blocks after the first that have vectors of their own."""
        return 0 if self.word_tokens is None else len(self.word_tokens)

    def visual_tokens(self, block: int) -> Tensor:
        """Returns the ([B,] N, V) tokens of block 0, 1, ... of the image tower."""
        assert self.image_tokens is not None
        return self.image_tokens[block]

    def text_tokens(self, block: int) -> Tensor:
        """Returns the (P, M, W) tokens of block 1, 2, ... of the text tower."""
        assert self.word_tokens is not None
        return self.word_tokens[block - 1]


@contextmanager
def reading(clip: Any, prompts: ImagePrompts) -> Iterator[None]:
    """Context in which the towers read ``prompts`` in place of the model's own learned prompts of equal shape."""
    learned: LearnedPrompts | None = getattr(clip, "prompts", None)
    depth, deep = prompts.visual_shape[0], prompts.text_depth
    handles, shadowed = [], []
    try:
        if depth and learned is not None and learned.visual_shape[0]:
            shadowed.append("visual_tokens")
        elif depth:
            blocks = clip.visual.transformer.resblocks
            handles.append(clip.visual.ln_pre.register_forward_pre_hook(prompts.append))
            for block in range(1, depth):
                handles.append(blocks[block].register_forward_pre_hook(partial(prompts.exchange_last, block)))
            handles.append(clip.visual.transformer.register_forward_hook(prompts.drop))
        if deep and learned is not None and learned.text_depth:
            shadowed.append("text_tokens")
        elif deep:
            blocks = text_transformer(clip).resblocks
            for block in range(1, 1 + deep):
                handles.append(blocks[block].register_forward_pre_hook(partial(prompts.exchange_first, block)))
        for name in shadowed:
            setattr(learned, name, getattr(prompts, name))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name in shadowed:
            if name in vars(learned):
                delattr(learned, name)


@contextmanager
def block_inputs(blocks: nn.ModuleList | None, count: int) -> Iterator[list[Tensor]]:
    """Collects the inputs (B, L, W) of the first ``count`` blocks at each forward."""
    given: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        given.append(inputs[0])

    handles = [block.register_forward_pre_hook(keep) for block in (blocks or [])[:count]]
    try:
        yield given
    finally:
        for handle in handles:
            handle.remove()


def image_blocks(clip: Any) -> nn.ModuleList | None:
    """Returns the blocks of a vision transformer; None for another image tower."""
    from open_clip.transformer import VisionTransformer

    if not isinstance(clip.visual, VisionTransformer):
        return None
    blocks: nn.ModuleList = clip.visual.transformer.resblocks
    return blocks


def first_image_tokens(clip: Any, count: int, depth: int) -> Tensor | None:
    """Returns the (D, N, V) initial image tokens; None where the image tower cannot take tokens.

    Those that the model has learned, as many as they are; else ``count`` for at most ``depth`` blocks, normal with
    deviation 0.02, always the same.
    """
    learned: LearnedPrompts | None = getattr(clip, "prompts", None)
    if learned is not None and learned.visual_shape[0]:
        return torch.stack([learned.visual_tokens(block).detach() for block in range(learned.visual_shape[0])])
    blocks = image_blocks(clip)
    if blocks is None:
        return None
    shape = min(depth, len(blocks)), count, clip.visual.conv1.out_channels
    tokens = SPREAD * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return tokens.to(clip.visual.conv1.weight)


class DeepPromptTower(PromptTower):
    """The text tower as a function of the M context vectors and of those that replace them in later blocks.

    The vectors of a prompt lie behind each other: M for each of D blocks. They start from what the model itself reads
    there, its own words or learned vectors, so that the class features are at first the model's own.

    Args:
        side: the prompts.
        count: M, fewer where a template has fewer words before the class name; as many as were learned, where deep
            vectors were learned.
        depth: D, the first block counted; no more than the tower has, and as many as were learned, where they were.

    Attributes:
        context: (T, D M, W).

    Raises:
        UserError: a template without a word before the class name, or a text tower whose blocks are out of reach.
    """

    def __init__(self, side: TextSide, count: int, depth: int) -> None:
        super().__init__(side)
        clip = side.classifier.clip
        learned: LearnedPrompts | None = getattr(clip, "prompts", None)
        transformer = text_transformer(clip)
        self.length = min(count, *side.before)
        if transformer is None or not self.length:
            raise UserError(
                "deep prompt tuning changes the words before the class name, in open_clip's own text tower; use a CLIP "
                "model, and templates that begin with a word, such as 'a photo of a {c}.'."
            )
        self.depth = min(depth, len(transformer.resblocks))
        if learned is not None and learned.text_depth:
            self.length, self.depth = learned.length, 1 + learned.text_depth
        with block_inputs(transformer.resblocks, self.depth) as given:
            side.encode(side.tokens[0])  # of any class: what lies before its name does not know it
        deep = [states[:, 1 : 1 + self.length] for states in given[1:]]
        self.context = torch.cat([self.context[:, : self.length], *deep], dim=1)

    def _encode(self, context: Tensor, c: Tensor, t: Tensor) -> Tensor:
        """Encodes (R, D M, W) vectors of R prompts of classes c and templates t into (R, D) unit features."""
        own = context.reshape(len(context), self.depth, self.length, -1).transpose(0, 1)  # (D, R, M, W)
        clean, clip = self._embedded[c, t], self.side.classifier.clip
        embeddings = torch.cat([clean[:, :1], own[0], clean[:, 1 + self.length :]], dim=1)
        tokens = self._tokens[c * self.side.tokens.shape[1] + t]
        with reading(clip, ImagePrompts(text=own[1:])):
            if self._tokens.shape[-1] == self.side.tokens.shape[-1]:
                return self.side.encode(tokens, embeddings)
            return read_short(clip, tokens, embeddings)
