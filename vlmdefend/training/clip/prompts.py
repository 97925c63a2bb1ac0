"""Creates the prompts that train in place of weights: context vectors, and the coupled deep prompts of FAP."""

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

DEPTH = 9  # blocks with prompt tokens, the first included, in the published runs of MaPLe and FAP
DEVIATION = 0.02  # standard deviation of the start of learned vectors that do not start at a word


class CoupledPrompts(LearnedPrompts):
    """Deep prompts of FAP (Zhou et al. 2024): a trained context, visual tokens, and linear maps between the towers.

    The context starts at the first words of a template and is mapped to the image tower's tokens of the first block;
    the tokens of each deeper block belong to the image tower and are mapped to the same block of the text tower. In
    MaPLe, all maps lead from text to image instead.

    Args:
        template: with ``{c}``.
        context: (M, W) start of the context.
        width: V, the width of the image tower.
        depth: D, the number of blocks of the image tower with prompts, the first included.
        text_depth: the number of blocks of the text tower with prompts, the first not included; at most D - 1.
        generator: draws the start of visual tokens and maps.
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
        """The numbers (D, M): that of image-tower blocks with prompts, and of tokens in each."""
        return 1 + len(self.deep), self.deep.shape[1]

    @property
    def text_depth(self) -> int:
        """Number of text-tower blocks with prompts after the first."""
        return len(self.to_text)

    def visual_tokens(self, block: int) -> Tensor:
        """Returns the (M, V) tokens of a block of the image tower."""
        found: Tensor = self.to_image(self.context) if block == 0 else self.deep[block - 1]
        return found

    def text_tokens(self, block: int) -> Tensor:
        """Returns the (M, W) tokens of a block of the text tower, from 1."""
        found: Tensor = self.to_text[block - 1](self.deep[block - 1])
        return found


def choose_prompts(classifier: TrainedClassifier, parts: str, seed: int) -> dict[str, nn.Parameter] | None:
    """Adds the prompts named by ``parts`` to the model and returns their parameters by name; None: no prompt's name.

    Args:
        classifier: all its own parameters are frozen and stay so.
        parts: ``context:M``: M vectors before the class name, one set for all classes; ``class-context:M``: one set for
            each class; ``deep:M``: M vectors that start at the first words of the run's template, and M tokens in the
            image tower, in the first nine blocks of each tower, or all if it has fewer; ``deep:MxD``: in D blocks.
        seed: of the start.

    Raises:
        UserError: a number out of range, or a tower that cannot take the prompts.
    """
    kind, _, count = parts.partition(":")
    if kind not in PROMPT_KINDS:
        return None
    length, depth = _read_length_and_depth(kind, count, parts)
    model, generator = classifier.model, torch.Generator().manual_seed(seed)
    if kind == "deep":
        prompts: LearnedPrompts = _deep_prompts(classifier, length, depth, generator, f"--trains {parts}")
    else:
        prompts = _context_prompts(classifier, length, kind == "class-context", generator, f"--trains {parts}")
    model.add_prompts(prompts, f"--trains {parts}")
    model.reader(classifier.class_names)  # raises here if a prompt is longer than the text tower's context
    for parameter in prompts.parameters():
        parameter.requires_grad_(True)
    classifier.trains_text = classifier.trains_prompts = True
    classifier.refresh()
    return {f"prompts.{name}": parameter for name, parameter in prompts.named_parameters()}


def _read_length_and_depth(kind: str, count: str, parts: str) -> tuple[int, int | None]:
    """Reads ``M`` or ``MxD``: the number of vectors, and the depth if it is given."""
    written = count.split("x")
    if not all(number.isdecimal() and int(number) > 0 for number in written) or len(written) > 1 + (kind == "deep"):
        example = "deep:2 or deep:2x9" if kind == "deep" else f"{kind}:16"
        raise UserError(f"--trains {parts}: write {kind}: and a whole number from 1, such as {example}.")
    return int(written[0]), int(written[1]) if len(written) > 1 else None


def _context_prompts(
    classifier: TrainedClassifier, length: int, per_class: bool, generator: torch.Generator, source: str
) -> LearnedPrompts:
    """Returns a random context of ``length`` vectors, one for all classes or one for each."""
    text = text_transformer(classifier.clip)
    if text is None:
        raise UserError(f"{source}: needs open_clip's own text tower; use a CLIP model such as ViT-B/32.")
    shape = (classifier.num_classes, length, text.width) if per_class else (length, text.width)
    start = DEVIATION * torch.randn(shape, generator=generator)
    class_names = classifier.class_names if per_class else None
    return LearnedPrompts(template=places(length), context=start, class_names=class_names)


def _deep_prompts(
    classifier: TrainedClassifier, length: int, depth: int | None, generator: torch.Generator, source: str
) -> CoupledPrompts:
    """Returns coupled prompts that start at the first ``length`` words of the run's template."""
    clip = classifier.clip
    check_vision_transformer(clip, depth or 1, source)
    blocks: Any = len(clip.visual.transformer.resblocks)
    deep = min(DEPTH, blocks) if depth is None else depth
    if len(classifier.templates) > 1:
        raise UserError(
            f"{source}: starts at the words of one template, and {len(classifier.templates)} were given; give one."
        )
    (template,) = classifier.templates
    reader = ContextReader(clip, classifier.model.tokenizer, classifier.class_names, template, length)
    text_depth = min(deep, len(text_transformer(clip).resblocks)) - 1
    return CoupledPrompts(template, reader.words, clip.visual.conv1.out_channels, deep, text_depth, generator)


def _linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """Returns a frozen linear layer initialized as torch does, but with draws from ``generator``."""
    with torch.random.fork_rng(devices=[]):
        layer = nn.Linear(inputs, outputs).requires_grad_(False)
    bound = 1 / math.sqrt(inputs)
    for parameter in layer.parameters():
        parameter.copy_(torch.rand(parameter.shape, generator=generator) * 2 * bound - bound)
    return layer
