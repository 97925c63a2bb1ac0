"""Statistics over records and per-image rows: intervals, paired tests, diagnostics. Torch-free."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """Names of version 0.1."""
    from vlmdefend.moved import old_member

    return old_member(__name__, name)
