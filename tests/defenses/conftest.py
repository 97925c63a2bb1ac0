"""What the tests of several defenses share; see also linear.py and fashion.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.defenses.fashion import TWO_TEMPLATES, fashion_classifier
from tests.defenses.linear import SIZE
from vlmdefend.defenses.test_time._token_statistics import known_images
from vlmdefend.defenses.test_time.tapt import Tapt
from vlmdefend.models.zero_shot.classifier import ZeroShotClassifier


@pytest.fixture(scope="session")
def images() -> torch.Tensor:
    """(4, 3, S, S) away from 0 and 1, so that no clamp interferes."""
    return 0.3 + 0.4 * torch.rand(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def weights() -> torch.Tensor:
    """Of a :class:`~tests.defenses.linear.Linear` of two classes."""
    return torch.randn(2, 3 * SIZE * SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def classifiers() -> dict[str, ZeroShotClassifier]:
    """The embedded zero-shot models of the classes of fashion; a test that changes one changes it back."""
    return {name: fashion_classifier(name) for name in ("tiny-rn", "tiny-vit")}


@pytest.fixture(scope="session")
def statistics_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TAPT's, of 12 images of uci-digits, for ``tiny-vit`` with four classes and two templates."""
    classifier, path = (
        fashion_classifier("tiny-vit", TWO_TEMPLATES, 4),
        tmp_path_factory.mktemp("known") / "of.safetensors",
    )
    Tapt().measure(classifier, *known_images("uci-digits", classifier, 12, 4 / 255)).save(path)
    return path
