"""Runs open_clip's text tower from tokens, or from embeddings in their place, to unit features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlmdefend.errors import UserError


def tokenized(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Returns (P, L) tokens of P prompts.

    Raises:
        UserError: a prompt longer than the context.
    """
    tokens: Tensor = tokenizer(list(texts))
    for text, row in zip(texts, tokens, strict=True):
        length = len(tokenizer.encode(text)) + 2
        if length > len(row):
            raise UserError(
                f"the prompt {text!r} has {length} tokens, the model reads {len(row)}; shorten the class name or "
                "the template."
            )
    return tokens


def encode_embedded(clip: Any, tokens: Tensor, embeddings: Tensor) -> Tensor:
    """Encodes (P, L, W) ``embeddings`` of (P, L) tokens into (P, D) unit features, differentiable in them."""
    handle = token_embedding(clip).register_forward_hook(lambda module, given, found: embeddings)
    try:
        features: Tensor = clip.encode_text(tokens, normalize=True)
    finally:
        handle.remove()
    return features


def looks_backwards(clip: Any) -> bool:
    """Returns whether this is OpenAI's text tower: causal, read at the end token, so that padding has no effect."""
    from open_clip.model import CLIP

    return type(clip) is CLIP and clip.attn_mask is not None and clip.text_pool_type == "argmax"


def without_padding(tokens: Tensor) -> Tensor:
    """Cuts (P, L) tokens to the length of the longest prompt, which is enough for a causal tower."""
    return tokens[:, : int(tokens.argmax(dim=1).max()) + 1]


def read_short(clip: Any, tokens: Tensor, embeddings: Tensor) -> Tensor:
    """Computes what :func:`encode_embedded` does, for prompts cut to a common length, with a causal tower."""
    length = tokens.shape[1]
    x = embeddings + clip.positional_embedding[:length]
    x = clip.transformer(x, attn_mask=clip.attn_mask[:length, :length])
    ends = tokens.argmax(dim=-1)
    x = clip.ln_final(x[torch.arange(len(x), device=x.device), ends])
    projection = clip.text_projection
    if projection is not None:
        x = projection(x) if isinstance(projection, nn.Linear) else x @ projection
    return nn.functional.normalize(x, dim=-1)


def token_embedding(clip: Any) -> nn.Embedding:
    """Returns the token embedding of the text tower.

    Raises:
        UserError: the tower is not open_clip's own.
    """
    for tower in (clip, getattr(clip, "text", None)):
        embedding = getattr(tower, "token_embedding", None)
        if isinstance(embedding, nn.Embedding):
            return embedding
    raise UserError(
        f"an attack on the prompts needs open_clip's own text tower; that of {type(clip).__name__} is another "
        "(a Hugging Face one); use a CLIP model such as ViT-B/32."
    )
