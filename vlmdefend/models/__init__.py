"""Models by name: pixels in [0, 1] to named outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmdefend.models.names import load_model

__all__ = ["load_model"]


def __getattr__(name: str) -> Any:
    if name == "load_model":
        from vlmdefend.models.names import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
