"""Images by name: embedded sets, folders, torchvision's sets, webdataset shards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlmdefend.registry import Registry

if TYPE_CHECKING:
    from vlmdefend.data.base import Source
    from vlmdefend.data.open import load_dataset

SOURCES: Registry[Source] = Registry(
    "dataset source", (f"{__name__}.sources",), separator="_"
)
__all__ = ["SOURCES", "load_dataset"]


def __getattr__(name: str) -> Any:
    if name == "load_dataset":
        from vlmdefend.data.open import load_dataset

        return load_dataset
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
