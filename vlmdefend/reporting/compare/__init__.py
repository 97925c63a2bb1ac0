"""Compares two run folders image by image."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """Names of version 0.1."""
    from vlmdefend.moved import old_member

    return old_member(__name__, name)
