"""How robust is a vision-language model, with this defense, really, and what does the robustness cost?

The public Python interface: :func:`load_model`, :func:`load_dataset`, :func:`evaluate`. Importing the package is
cheap; torch is imported when one of them is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlmdefend.moved import install
from vlmdefend.version import __version__

__all__ = ["__version__", "evaluate", "load_dataset", "load_model"]

if TYPE_CHECKING:
    from vlmdefend.data import load_dataset
    from vlmdefend.evaluation import evaluate
    from vlmdefend.models import load_model

install()  # old import paths keep working for one version
_PACKAGES = {"load_model": "models", "load_dataset": "data", "evaluate": "evaluation"}


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_PACKAGES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
