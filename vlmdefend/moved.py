"""Old import paths of version 0.1, which keep working for version 0.2 with a DeprecationWarning.

Modules moved into packages by family, and classes got plainer names. ``moved_names`` maps every old
module to its new place and every old name to its new one; a finder at the end of ``sys.meta_path`` serves the imports.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from vlmdefend.moved_names import MODULES, NAMES


class MovedFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of version 0.1 that have moved; used only where no module of that name exists."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Returns a spec for an old module, None for every other name."""
        old = fullname.removeprefix("vlmdefend.")
        if not fullname.startswith("vlmdefend.") or (old not in MODULES and old not in NAMES):
            return None
        return importlib.machinery.ModuleSpec(fullname, self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """Returns a module whose names are those of the new place, under their old names too."""
        return _MovedModule(spec.name, f"Moved: see {new_place(spec.name.removeprefix('vlmdefend.'))}.")

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is run: names are looked up when they are used."""


class _MovedModule(ModuleType):
    """An old module: each name is looked up in its new place."""

    def __getattr__(self, name: str) -> Any:
        return old_member(self.__name__, name)


def new_place(old: str) -> str:
    """Returns where the content of an old module is now."""
    if old in MODULES:
        return f"vlmdefend.{MODULES[old]}"
    return " and ".join(sorted({f"vlmdefend.{place.rpartition('.')[0]}" for place in NAMES[old].values()}))


def old_member(module: str, name: str) -> Any:
    """Returns what ``module.name`` of version 0.1 is now, with a DeprecationWarning that names the new place.

    Raises:
        AttributeError: there never was such a name.
    """
    old = module.removeprefix("vlmdefend.")
    place = NAMES.get(old, {}).get(name) or (f"{MODULES[old]}.{name}" if old in MODULES else None)
    target, _, new = (place or "").rpartition(".")
    found = getattr(importlib.import_module(f"vlmdefend.{target}"), new, None) if place else None
    if found is None or name.startswith("__"):
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    warnings.warn(f"{module}.{name} is now vlmdefend.{place}; change the import.", DeprecationWarning, stacklevel=3)
    return found


def install() -> None:
    """Adds the finder for old modules, once."""
    if not any(isinstance(finder, MovedFinder) for finder in sys.meta_path):
        sys.meta_path.append(MovedFinder())
