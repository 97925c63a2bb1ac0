"""Prompts that train in the place of weights: where they begin, and the deep ones that hang together."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from vlmdefend.errors import UserError
from vlmdefend.models.prompts.context import ContextReader
from vlmdefend.models.prompts.learned_prompts import (
    LearnedPrompts,
    check_vision_transformer,
    places,
    text_transformer,
)
from vlmdefend.training.clip.classifier import TrainedClassifier
from vlmdefend.training.settings.clip_settings import PROMPT_KINDS

DEPTH = 9  # blocks with tokens of their own, the first counted, in the published runs of MaPLe and FAP
DEVIATION = 0.02  # of where learned vectors begin that begin at no word


class CoupledPrompts(LearnedPrompts):
    """FAP's deep prompts (Zhou et al. 2024): a context, visual tokens, and linear maps between the towers train.

    The context begins at the first words of a template and is mapped to the image tower's first tokens; the tokens of
    each deeper block are the image tower's own and are mapped to that block of the text tower. Other than in MaPLe,
    where all maps lead from text to image.

    Args:
        template: with ``{c}``.
        context: (M, W), where it begins.
        width: V of the image tower.
        depth: D blocks of the image tower, the first counted.
        text_depth: of the text tower, the first not counted; at most D - 1.
        generator: of where the rest begins.
    """

    def __init__(
        self, template: str, context: Tensor, width: int, depth: int, text_depth: int, generator: torch.Generator
    ) -> None:
        super().__init__(template=template, context=context)
        count, narrow = context.shape
        deep = DEVIATION * torch.randn(depth - 1, count, width, generator=generator)
        self.deep = nn.Parameter(deep.to(context.device), requires_grad=False)  # (D - 1, M, V)
        self.to_image = _linear(narrow, width, generator).to(context.device)
        self.to_text = nn.ModuleList(_linear(width, narrow, generator).to(context.device) for _ in range(text_depth))

    @property
    def visual_shape(self) -> tuple[int, int]:
        """(D, M)."""
        return 1 + len(self.deep), self.deep.shape[1]

    @property
    def text_depth(self) -> int:
        """Blocks after the first."""
        return len(self.to_text)

    def visual_tokens(self, block: int) -> Tensor:
        """(M, V)."""
        found: Tensor = self.to_image(self.context) if block == 0 else self.deep[block - 1]
        return found

    def text_tokens(self, block: int) -> Tensor:
        """(M, W)."""
        found: Tensor = self.to_text[block - 1](self.deep[block - 1])
        return found


def choose_prompts(classifier: TrainedClassifier, parts: str, seed: int) -> dict[str, nn.Parameter] | None:
    """Put the prompts that ``parts`` says into the model and return their parameters by name; None for another word.

    Args:
        classifier: all its own parameters are frozen, and stay so.
        parts: ``context:M``: M vectors before the class name, one set for all classes; ``class-context:M``: a set for
            each class; ``deep:M``: M of them, which begin at the first words of the run's template, and M tokens in the
            image tower, in the first nine blocks of either tower, or as many as it has; ``deep:MxD``: in D blocks.
        seed: of where they begin.

    Raises:
        UserError: a number that does not fit, or a tower that has no place for them.
    """
    kind, _, count = parts.partition(":")
    if kind not in PROMPT_KINDS:
        return None
    length, depth = _numbers(kind, count, parts)
    model, generator = classifier.model, torch.Generator().manual_seed(seed)
    if kind == "deep":
        prompts: LearnedPrompts = _deep(classifier, length, depth, generator, f"--trains {parts}")
    else:
        prompts = _context(classifier, length, kind == "class-context", generator, f"--trains {parts}")
    model.add_prompts(prompts, f"--trains {parts}")
    model.reader(classifier.class_names)  # refuses here what does not fit the text tower's length
    for parameter in prompts.parameters():
        parameter.requires_grad_(True)
    classifier.trains_text = classifier.trains_prompts = True
    classifier.refresh()
    return {f"prompts.{name}": parameter for name, parameter in prompts.named_parameters()}


def _numbers(kind: str, count: str, parts: str) -> tuple[int, int | None]:
    written = count.split("x")
    if not all(number.isdecimal() and int(number) > 0 for number in written) or len(written) > 1 + (kind == "deep"):
        example = "deep:2 or deep:2x9" if kind == "deep" else f"{kind}:16"
        raise UserError(f"--trains {parts}: write {kind}: and a whole number from 1, such as {example}.")
    return int(written[0]), int(written[1]) if len(written) > 1 else None


def _context(
    classifier: TrainedClassifier, length: int, own: bool, generator: torch.Generator, source: str
) -> LearnedPrompts:
    text = text_transformer(classifier.clip)
    if text is None:
        raise UserError(f"{source}: needs open_clip's own text tower; use a CLIP model such as ViT-B/32.")
    shape = (classifier.num_classes, length, text.width) if own else (length, text.width)
    start = DEVIATION * torch.randn(shape, generator=generator)
    return LearnedPrompts(template=places(length), context=start, class_names=classifier.class_names if own else None)


def _deep(
    classifier: TrainedClassifier, length: int, depth: int | None, generator: torch.Generator, source: str
) -> CoupledPrompts:
    clip = classifier.clip
    check_vision_transformer(clip, depth or 1, source)
    blocks: Any = len(clip.visual.transformer.resblocks)
    deep = min(DEPTH, blocks) if depth is None else depth
    if len(classifier.templates) > 1:
        raise UserError(f"{source}: begins at the words of one template, {len(classifier.templates)} were given.")
    (template,) = classifier.templates
    reader = ContextReader(clip, classifier.model.tokenizer, classifier.class_names, template, length)
    text_depth = min(deep, len(text_transformer(clip).resblocks)) - 1
    return CoupledPrompts(template, reader.words, clip.visual.conv1.out_channels, deep, text_depth, generator)


def _linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """As torch begins a linear layer, from a generator."""
    with torch.random.fork_rng(devices=[]):
        layer = nn.Linear(inputs, outputs).requires_grad_(False)
    bound = 1 / math.sqrt(inputs)
    for parameter in layer.parameters():
        parameter.copy_(torch.rand(parameter.shape, generator=generator) * 2 * bound - bound)
    return layer
