"""How one number per image meets a whole image: as in ``vlmdefend.types``, which stands above the kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def per_image(values: Tensor, like: Tensor) -> Tensor:
    """Returns (B,) values in a shape that broadcasts over the (B, ...) tensor ``like``."""
    return values.view(-1, *[1] * (like.dim() - 1))
