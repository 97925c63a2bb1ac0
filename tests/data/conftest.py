"""Small pictures, class folders and shards in a temporary directory."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlmdefend.data.base import ImageSet

Encode = Callable[..., bytes]


def _encode(seed: int = 0, size: tuple[int, int] = (6, 5), file_format: str = "PNG", **options: Any) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, file_format, **options)
    return stream.getvalue()


def _tar(path: Path, members: Iterable[tuple[str, bytes]], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def encode() -> Encode:
    """``encode(seed, size, file_format)`` -> the bytes of a random picture."""
    return _encode


@pytest.fixture
def put(tmp_path: Path) -> Callable[..., Path]:
    """``put("a/b.png", content)`` writes a file under the temporary directory, by default a picture."""

    def write(name: str, content: bytes | str | None = None) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            suffix = path.suffix.lower()
            content = _encode(len(name), file_format="JPEG" if suffix in (".jpg", ".jpeg") else "PNG")
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


@pytest.fixture
def tar() -> Callable[..., Path]:
    """``tar(path, [(member, bytes), ...], mode)`` writes a tar file."""
    return _tar


@pytest.fixture
def layout(tmp_path: Path) -> Callable[..., Path]:
    """A set in CLIP_benchmark's layout: ``layout({0: [(member, bytes)], 1: ...})`` -> its folder."""

    def write(
        shards: Mapping[int, list[tuple[str, bytes]]],
        *,
        classes: str = "cat\ndog\n",
        split: str = "test",
        suffix: str = ".tar",
    ) -> Path:
        folder = tmp_path / "set"
        for number, members in shards.items():
            _tar(folder / split / f"{number}{suffix}", members, "w:gz" if suffix.endswith("gz") else "w")
        (folder / split / "nshards.txt").write_text(f"{len(shards)}\n")
        (folder / "classnames.txt").write_text(classes)
        (folder / "zeroshot_classification_templates.txt").write_text("a drawing of a {c}.\n")
        return folder

    return write


@pytest.fixture
def toy_set() -> Callable[..., ImageSet]:
    """``toy_set(labels)``: a set whose picture ``i`` is grey level ``i``."""

    def build(labels: list[int], size: tuple[int, int] = (4, 3)) -> ImageSet:
        return ImageSet(
            name="toy",
            split="test",
            class_names=tuple(f"class {c}" for c in range(max(labels, default=0) + 1)),
            templates=("a {c}.",),
            ids=tuple(f"id{i:04d}" for i in range(len(labels))),
            labels=tuple(labels),
            read=lambda i: Image.new("RGB", size, (i % 256,) * 3),
        )

    return build
