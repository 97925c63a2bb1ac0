"""The layers of the package: no import runs back, and none runs in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import vlmdefend

ROOT = Path(vlmdefend.__file__).parent
FAMILIES = ("training_free", "test_time", "training_time", "adaptation", "gradient")  # one file per method
LARGEST = 15


def modules() -> dict[str, Path]:
    """Dotted names of all modules, with their files."""
    found = {}
    for file in sorted(ROOT.rglob("*.py")):
        parts = file.relative_to(ROOT.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(file: Path, known: dict[str, Path]) -> Iterator[str]:
    """Modules of the package that a file imports: at the top, inside of functions, and for typing alone."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield from [inner] if inner in known else [node.module] if node.module in known else []
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach one another."""
    reach: dict[str, set[str]] = {}
    for start in graph:
        seen: set[str] = set()
        stack = [start]
        while stack:
            for target in graph[stack.pop()] - seen:
                seen.add(target)
                stack.append(target)
        reach[start] = seen
    groups = {tuple(sorted(b for b in reach[a] if a in reach[b])) for a in graph if a in reach[a]}
    return [list(group) for group in sorted(groups)]


def test_no_modules_import_one_another_in_a_circle() -> None:
    known = modules()
    graph = {name: set(imports(file, known)) - {name} for name, file in known.items()}
    assert len(graph) > 300
    assert circles(graph) == []


def test_a_circle_would_be_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert circles({"a": {"b"}, "b": set()}) == []


@pytest.mark.parametrize("folder", sorted({file.parent for file in modules().values()}), ids=lambda p: p.name)
def test_a_package_holds_at_most_so_many_files_unless_it_is_a_family_of_methods(folder: Path) -> None:
    count = len([file for file in folder.glob("*.py") if file.name != "__init__.py"])
    assert count <= LARGEST or folder.name in FAMILIES, f"{folder}: {count} files; make two packages of it"
