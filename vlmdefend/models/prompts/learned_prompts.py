"""Learned prompts of a CLIP: context vectors before the class name, and tokens inside of the towers.

They are a module of the clip, ``clip.prompts``, so that its weights' hash, its state and its parameters hold them; the
clip's own weights stay as they are. open_clip's towers have no place for tokens: hooks put them in and take them out.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vlmdefend.errors import UserError

PROMPTS_KEY = "learned_prompts"  # of a model's configuration
PLACE = "X"  # the word that stands in a template where a learned vector goes


def places(count: int) -> str:
    """Returns the template of ``count`` learned vectors with the class name at the end, as CoOp writes it."""
    return " ".join([PLACE] * count + ["{c}."])


class LearnedPrompts(nn.Module):
    """Learned context vectors, image tokens and text tokens; any of the three.

    Args:
        template: the prompt of a class, with ``{c}``; in place of its first M tokens the context is read.
        context: (M, W) vectors shared by all classes (CoOp, Zhou et al. 2022), or (C, M, W): each class has its own.
            None: the prompts are the user's templates.
        visual: (D, N, V) tokens behind the patches of a vision transformer: those of its first block come in before
            the first norm, at each of the next D - 1 blocks others take their place (MaPLe, Khattak et al. 2023).
        text: (D - 1, M, W) vectors that take the place of the context at the second block of the text tower and after.
        class_names: whose contexts these are, where each class has its own.

    Raises:
        UserError: shapes that do not belong together.
    """

    context: nn.Parameter | None
    visual: nn.Parameter | None
    text: nn.Parameter | None

    def __init__(
        self,
        *,
        template: str = "",
        context: Tensor | None = None,
        visual: Tensor | None = None,
        text: Tensor | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        own = context is not None and context.dim() == 3
        if own != (class_names is not None) or (own and context is not None and len(context) != len(class_names or ())):
            raise UserError("learned prompts: contexts of each class need the names of as many classes.")
        if text is not None and (context is None or context.shape[-2:] != text.shape[1:]):
            raise UserError("learned prompts: the text tower's deep vectors must be as many as the context has.")
        self.template, self.class_names = template, None if class_names is None else tuple(class_names)
        for name, value in (("context", context), ("visual", visual), ("text", text)):
            parameter = None if value is None else nn.Parameter(value.detach().clone().float(), requires_grad=False)
            self.register_parameter(name, parameter)

    @property
    def config(self) -> dict[str, Any]:
        """The description of the prompts in a model's configuration."""
        return {"template": self.template, "class_names": None if self.class_names is None else list(self.class_names)}

    @property
    def length(self) -> int:
        """M, the number of context vectors; 0 without context."""
        return 0 if self.context is None else int(self.context.shape[-2])

    @property
    def visual_shape(self) -> tuple[int, int]:
        """The numbers (D, N): blocks with tokens of their own, and how many tokens; zeros if none."""
        return (0, 0) if self.visual is None else (int(self.visual.shape[0]), int(self.visual.shape[1]))

    @property
    def text_depth(self) -> int:
        """Number of text blocks after the first with vectors of their own."""
        return 0 if self.text is None else len(self.text)

    def visual_tokens(self, block: int) -> Tensor:
        """Returns the (N, V) tokens of block 0, 1, ... of the image tower."""
        assert self.visual is not None
        return self.visual[block]

    def text_tokens(self, block: int) -> Tensor:
        """Returns the (M, W) vectors of block 1, 2, ... of the text tower."""
        assert self.text is not None
        return self.text[block - 1]

    def deployed(self) -> LearnedPrompts:
        """Returns the prompts as plain vectors, without the networks that computed them in training."""
        return LearnedPrompts(
            template=self.template,
            context=self.context,
            visual=self._stacked(self.visual_tokens, range(self.visual_shape[0])),
            text=self._stacked(self.text_tokens, range(1, 1 + self.text_depth)),
            class_names=self.class_names,
        )

    def check_classes(self, class_names: Sequence[str]) -> None:
        """Refuses other classes than those that class-wise contexts were learned for.

        Raises:
            UserError: other classes are given.
        """
        if self.class_names is not None and tuple(class_names) != self.class_names:
            known = ", ".join(self.class_names[:3]) + (" ..." if len(self.class_names) > 3 else "")
            raise UserError(
                f"this model's prompts were learned for each of {len(self.class_names)} classes ({known}) and say "
                "nothing of others; use it on those, or learn a context for all classes (--trains context:M)."
            )

    @staticmethod
    def _stacked(tokens: Any, blocks: range) -> Tensor | None:
        return torch.stack([tokens(block).detach() for block in blocks]) if blocks else None

    # what the hooks do

    def append(self, norm: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
        """Appends the N tokens: (B, P, V) before the first norm to (B, P + N, V)."""
        (x,) = given
        tokens = self.visual_tokens(0).to(x.dtype)
        return (torch.cat([x, tokens.expand(len(x), -1, -1)], dim=1),)

    def exchange_last(self, block: int, module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Replaces the last N tokens of (B, P + N, V) by those of the next block."""
        x, *others = given
        tokens = self.visual_tokens(block).to(x.dtype)
        return (torch.cat([x[:, : -tokens.shape[-2]], tokens.expand(len(x), -1, -1)], dim=1), *others)

    def drop(self, transformer: nn.Module, given: tuple[Tensor, ...], found: Tensor) -> Tensor:
        """Removes the N tokens after the last block: (B, P + N, V) to (B, P, V)."""
        return found[:, : -self.visual_shape[1]]

    def exchange_first(self, block: int, module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Replaces the M tokens after the start of (P, L, W) by those of the next text block."""
        x, *others = given
        tokens = self.text_tokens(block).to(x.dtype).expand(len(x), -1, -1)
        return (torch.cat([x[:, :1], tokens, x[:, 1 + tokens.shape[1] :]], dim=1), *others)


def attach(clip: Any, prompts: LearnedPrompts, source: str = "these prompts") -> None:
    """Makes ``clip`` read ``prompts`` from now on, as its module ``prompts``.

    Raises:
        UserError: it has some already, or its towers are not of the size and kind that they need; nothing was changed.
    """
    if getattr(clip, "prompts", None) is not None:
        raise UserError(f"{source}: the model has learned prompts already; give one without.")
    text = text_transformer(clip)
    _check_text(clip, text, prompts, source)
    if prompts.visual_shape[0]:
        check_vision_transformer(clip, prompts.visual_shape[0], source)
        _check_width(prompts.visual_tokens(0), clip.visual.conv1.out_channels, "image", source)
    clip.add_module("prompts", prompts.to(clip.logit_scale.device))
    for block in range(1, 1 + prompts.text_depth):
        text.resblocks[block].register_forward_pre_hook(partial(prompts.exchange_first, block))
    if prompts.visual_shape[0]:
        tower = clip.visual
        tower.ln_pre.register_forward_pre_hook(prompts.append)
        for block in range(1, prompts.visual_shape[0]):
            tower.transformer.resblocks[block].register_forward_pre_hook(partial(prompts.exchange_last, block))
        tower.transformer.register_forward_hook(prompts.drop)


def text_transformer(clip: Any) -> Any:
    """Returns the blocks of the text tower; None if they are not open_clip's own."""
    for tower in (clip, getattr(clip, "text", None)):
        transformer = getattr(tower, "transformer", None)
        if hasattr(transformer, "resblocks"):
            return transformer
    return None


def check_vision_transformer(clip: Any, depth: int, source: str) -> None:
    """Refuses an image tower that is not open_clip's vision transformer with at least ``depth`` blocks.

    Raises:
        UserError: it is another tower, or has fewer blocks.
    """
    from open_clip.transformer import VisionTransformer

    tower = clip.visual
    if not isinstance(tower, VisionTransformer):
        raise UserError(
            f"{source}: tokens inside of the image tower are defined for a vision transformer, and this one is "
            f"{type(tower).__name__}; choose a ViT, or learn the text context alone (--trains context:M)."
        )
    blocks = len(tower.transformer.resblocks)
    if depth > blocks:
        raise UserError(f"{source}: tokens for {depth} blocks, the image tower has {blocks}; give fewer.")


def _check_text(clip: Any, text: Any, prompts: LearnedPrompts, source: str) -> None:
    if prompts.context is None:
        return
    if text is None:
        raise UserError(
            f"{source}: a context needs open_clip's own text tower, and this one is another; use a CLIP model such as "
            "ViT-B/32."
        )
    _check_width(prompts.context, text.width, "text", source)
    if prompts.text_depth >= len(text.resblocks):
        raise UserError(
            f"{source}: vectors for {1 + prompts.text_depth} blocks, the text tower has {len(text.resblocks)}; give "
            "fewer."
        )


def _check_width(tokens: Tensor, width: int, tower: str, source: str) -> None:
    if tokens.shape[-1] != width:
        raise UserError(
            f"{source}: vectors of {tokens.shape[-1]} entries, the model's {tower} tower has {width}; choose the "
            "architecture that they were learned with."
        )
