"""How a kernel becomes an operator of torch: one schema, one body, one rule for fake tensors."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Scale = float | Tensor  # a number, or one per image (B,)


def operator(schema: str, body: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register ``vlmdefend::<name>``; what is returned calls it (a ``torch.library.CustomOpDef``).

    Args:
        schema: ``name(Tensor(a!) changed, Tensor read, ...) -> ()`` in torch's notation.
        body: runs on real tensors, on whatever device.
        fake: the shapes of what ``body`` returns, without computing.
    """
    name, signature = schema.split("(", 1)
    changed = re.findall(r"\w+!\) (\w+)", signature)
    defined = torch.library.custom_op(f"vlmdefend::{name}", body, mutates_args=changed, schema=f"({signature}")
    defined.register_fake(fake)
    return defined


def split(scale: Scale) -> tuple[float, Tensor | None]:
    """A scale as operators take it: a number, and a (B,) tensor that stands for it where there is one."""
    return (0.0, scale) if isinstance(scale, Tensor) else (float(scale), None)


def joined(number: float, each: Tensor | None) -> Scale:
    """The scale that :func:`split` took apart."""
    return number if each is None else each
