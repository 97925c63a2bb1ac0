"""Sources of images by name, one file per source."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmdefend.registry import Registry

if TYPE_CHECKING:
    from vlmdefend.data.base import Source

SOURCES: Registry[Source] = Registry("dataset source", (__name__,), separator="_")
__all__ = ["SOURCES"]
