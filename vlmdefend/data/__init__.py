"""Images by name: embedded sets, folders, torchvision's sets, webdataset shards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlmdefend.data.sources import SOURCES

if TYPE_CHECKING:
    from vlmdefend.data.open import listed_datasets, load_dataset

__all__ = ["SOURCES", "listed_datasets", "load_dataset"]


def __getattr__(name: str) -> Any:
    if name in ("listed_datasets", "load_dataset"):
        from vlmdefend.data import open as opening

        return getattr(opening, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
