"""Class features of a learned context, as a differentiable function of its vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlmdefend.errors import UserError
from vlmdefend.models.zero_shot.text_side import parts_of
from vlmdefend.models.zero_shot.text_tower import (
    encode_embedded,
    looks_backwards,
    read_short,
    token_embedding,
    tokenized,
    without_padding,
)


class ContextReader:
    """Computes class features from M context vectors that stand after the start token of C prompts.

    Args:
        clip: whose text tower reads.
        tokenizer: open_clip's own.
        class_names: C names.
        template: with ``{c}``, and at least M tokens before it.
        length: M.

    Raises:
        UserError: a text tower that is not open_clip's own; a prompt longer than it reads; too few tokens before the
            class name.
    """

    def __init__(self, clip: Any, tokenizer: Any, class_names: Sequence[str], template: str, length: int) -> None:
        self._clip, self._length = clip, length
        before = len(tokenizer.encode(template.split("{c}")[0]))
        if before < length:
            raise UserError(
                f"the prompt {template!r} has {before} tokens before the class name, fewer than the {length} vectors "
                "that are learned; give a template with more words, or learn fewer."
            )
        tokens = tokenized(tokenizer, [template.replace("{c}", name) for name in class_names])
        self._short = looks_backwards(clip)
        if self._short:  # without the padding behind the longest prompt
            tokens = without_padding(tokens)
        embedding = token_embedding(clip)
        self._tokens = tokens.to(embedding.weight.device)  # (C, L)
        self.words = embedding(self._tokens[0, 1 : 1 + length]).detach().clone()  # (M, W) of the template itself

    def __call__(self, context: Tensor) -> Tensor:
        """Turns an (M, W), or (C, M, W), context into (C, D) unit class features, differentiable in the context."""
        found, embedding = [], token_embedding(self._clip)
        for rows in parts_of(torch.arange(len(self._tokens), device=self._tokens.device)):
            own = context.expand(len(rows), -1, -1) if context.dim() == 2 else context[rows]
            words = embedding(self._tokens[rows])
            embeddings = torch.cat([words[:, :1], own, words[:, 1 + self._length :]], dim=1)
            read = read_short if self._short else encode_embedded
            found.append(read(self._clip, self._tokens[rows], embeddings))
        return torch.cat(found)
