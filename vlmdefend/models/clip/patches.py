"""Features of each patch of an image, in the space of the text features."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from vlmdefend.errors import UserError


def with_patches(visual: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Runs one forward of an open_clip image tower; returns pooled and per-patch features.

    A vision transformer: its patch tokens after the last norm and the projection, as the class token has them. CLIP's
    ResNet has no such tokens: its last feature map, each place through the value and output projections of the
    attention pool, which is what the pool averages (Zhou et al. 2022, MaskCLIP).

    Args:
        visual: in the mode that is wanted.
        pixels: (B, 3, S, S), normalised.

    Returns:
        (B, D) features and (B, N, D), N = G x G places row by row; neither normalised.

    Raises:
        UserError: another kind of image tower.
    """
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.transformer import VisionTransformer

    tower: Any = visual
    if isinstance(visual, VisionTransformer) and tower.attn_pool is None and tower.pool_type in ("tok", "avg"):
        return _of_transformer(tower, pixels)
    if isinstance(visual, ModifiedResNet):
        return _of_resnet(tower, pixels)
    raise UserError(
        f"the places of an image: {type(visual).__name__} pools in its own way; use a model with CLIP's own vision "
        "transformer or ResNet, such as ViT-B/32."
    )


def _of_transformer(tower: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    tokens = tower.transformer(tower._embeds(pixels))
    pooled, _ = tower._pool(tokens)
    patches = tower.ln_post(tokens[:, 1:])
    if tower.proj is not None:
        return pooled @ tower.proj, patches @ tower.proj
    return pooled, patches


def _of_resnet(tower: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    places = tower.stem(pixels)
    for layer in (tower.layer1, tower.layer2, tower.layer3, tower.layer4):
        places = layer(places)
    pool = tower.attnpool
    rows = places.flatten(2).transpose(1, 2) + pool.positional_embedding[1:].to(places.dtype)
    return pool(places), F.linear(pool.v_proj(rows), pool.c_proj.weight, pool.c_proj.bias)
