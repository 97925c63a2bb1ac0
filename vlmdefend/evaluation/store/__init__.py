"""Records and per-image rows on disk, and the keys under which they are found again."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """Names of version 0.1."""
    from vlmdefend.moved import old_member

    return old_member(__name__, name)
