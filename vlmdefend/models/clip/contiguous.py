"""Attention in a memory layout that is faster with frozen weights, with the same values.

``torch.nn.MultiheadAttention`` with ``batch_first`` works on a transposed, non-contiguous input. With trainable
weights the in-projection is one ``addmm``/``mm``; with frozen weights it becomes a ``bmm`` of L small products,
forward and backward, which is slower on a CPU than what freezing saves. The classes here compute the same outputs
batch first, without the transposes, and keep the lower peak memory of frozen weights. A side effect that a
benchmark welcomes: a forward without gradients takes the same path, so it gives the same bits as one with them.

They have no state of their own: the class of an existing module is exchanged, so names, parameters and
checkpoints stay plain open_clip's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from open_clip.modified_resnet import AttentionPool2d
from torch import cat, nn

if TYPE_CHECKING:
    from torch import Tensor


class BatchFirstAttention(nn.MultiheadAttention):
    """Self-attention over (N, L, E) in the batch-first layout; other uses of the module go to its parent."""

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """(N, L, E) three times the same tensor -> (N, L, E) and no weights; options as in the parent."""
        mask = options.get("attn_mask")
        if (
            query is not key
            or key is not value
            or query.dim() != 3
            or query.is_nested
            or options.get("need_weights", True)
            or options.get("key_padding_mask") is not None
            or (mask is not None and (mask.dim() != 2 or not mask.is_floating_point()))
            or (self.training and self.dropout > 0)
        ):
            return super().forward(query, key, value, **options)
        n, length, width = query.shape
        packed = F.linear(query, self.in_proj_weight, self.in_proj_bias)  # (N, L, 3E)
        q, k, v = packed.view(n, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)  # (N, H, L, E/H)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(attended.transpose(1, 2).reshape(n, length, width)), None


class FirstTokenPool(AttentionPool2d):  # type: ignore[misc]
    """open_clip's attention pooling with the query of the first token only, which is all that it returns."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns the pooled (N, D) features of an (N, E, h, w) map."""
        x = x.flatten(2).transpose(1, 2)  # (N, hw, E)
        x = cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.positional_embedding.to(x.dtype)
        n, length, width = x.shape
        q = self.q_proj(x[:, :1]).view(n, 1, self.num_heads, -1).transpose(1, 2)  # (N, H, 1, E/H)
        k = self.k_proj(x).view(n, length, self.num_heads, -1).transpose(1, 2)
        v = self.v_proj(x).view(n, length, self.num_heads, -1).transpose(1, 2)
        pooled: Tensor = self.c_proj(F.scaled_dot_product_attention(q, k, v).reshape(n, width))
        return pooled


def use_contiguous_attention(model: nn.Module) -> None:
    """Replaces the attention of every transformer block and attention pool in ``model``, in place."""
    for module in model.modules():
        if type(module) is AttentionPool2d:
            module.__class__ = FirstTokenPool
        elif (
            type(module) is nn.MultiheadAttention
            and module.batch_first
            and module.in_proj_weight is not None
            and module.bias_k is None
            and not module.add_zero_attn
        ):
            module.__class__ = BatchFirstAttention
