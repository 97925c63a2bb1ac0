"""TAPT's statistics are the moments of tokens of known images, out of a file or of a data set."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.defenses.fashion import TWO_TEMPLATES, fashion_batch, fashion_classifier, streams
from vlmdefend.defenses.test_time._token_statistics import Moments, TokenStatistics
from vlmdefend.defenses.test_time.tapt import Tapt
from vlmdefend.errors import UserError
from vlmdefend.evaluation.cell.query_count import CountingModel
from vlmdefend.models.prompts.image_prompts import block_inputs
from vlmdefend.models.zero_shot.classifier import ZeroShotClassifier
from vlmdefend.types import Batch

VIEWS = 24


@pytest.fixture(scope="module")
def classifier() -> ZeroShotClassifier:
    return fashion_classifier("tiny-vit", TWO_TEMPLATES, 4)


@pytest.fixture(scope="module")
def batch() -> Batch:
    return fashion_batch(6)


def test_moments_and_their_distance_by_hand() -> None:
    """Two views (0, 4), (2, 4): means (1, 4), variances (1, 0). Known: means (0, 4), variances (0, 2)."""
    known = Moments(torch.tensor([[[0.0, 4.0]]]), torch.tensor([[[0.0, 2.0]]]))
    views = torch.tensor([[[[0.0, 4.0]], [[2.0, 4.0]]]])  # (B, k, L, V)
    assert known.distance([views]).tolist() == [0.5 * ((1 + 0) / 2 + (1 + 2) / 2)]
    found = Moments.of([views[0]])
    assert found.mean.tolist() == [[[1.0, 4.0]]]
    assert found.variance.tolist() == [[[2.0, 0.0]]]  # divided by N - 1
    target = TokenStatistics(found, known)
    assert Tapt(gamma=1.0, weight=9.0).alignment([views], target).tolist() == [9.0]
    assert Tapt(gamma=0.0, weight=9.0).alignment([views], target).tolist() == [9.0 * 0.5 * 0.5]


def test_statistics_are_those_of_the_tokens_of_known_images(classifier: ZeroShotClassifier, batch: Batch) -> None:
    """With no image tokens of its own but those of the model, all but the last two are the bare model's at block 0."""
    blocks = classifier.clip.visual.transformer.resblocks
    with block_inputs(blocks, 1) as given:
        classifier.features(batch.images)
    found = Tapt().measure(classifier, batch.images, batch.images.flip(-1))
    assert found.clean.mean.shape == (4, 19, 128)
    assert torch.allclose(found.clean.mean[0, :-2], given[0].mean(dim=0), atol=1e-5)
    assert torch.allclose(found.clean.variance[0, :-2], given[0].var(dim=0), atol=1e-5)
    assert found.clean.variance[:, -2:].abs().max() < 1e-9  # all images have the same tokens
    assert not torch.allclose(found.clean.mean, found.adversarial.mean, atol=1e-2)


def test_statistics_come_from_a_data_set_too_and_are_measured_once(batch: Batch, statistics_file: Path) -> None:
    counted = CountingModel(fashion_classifier("tiny-vit", TWO_TEMPLATES, 4))
    from_set = Tapt(views=VIEWS, statistics="uci-digits", known=12).wrap(counted)
    asked = counted.forwards
    assert asked == 24
    again = Tapt(views=VIEWS, statistics="[uci-digits]", known=12)
    Tapt(views=VIEWS, statistics="uci-digits", known=12).surrogate(counted)
    assert counted.forwards == asked
    expected = Tapt(views=VIEWS, statistics=str(statistics_file)).wrap(counted)
    found = [pipeline(batch.images, streams(batch)).logits for pipeline in (from_set, again.wrap(counted), expected)]
    assert torch.equal(found[0], found[1])
    assert torch.allclose(found[0], found[2], atol=1e-4)


def test_statistics_that_cannot_be_had_or_are_of_other_tokens_are_refused_in_a_sentence(
    classifier: ZeroShotClassifier, statistics_file: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"not this")
    for statistics, reason in (
        (str(other), "cannot be read"),
        ("none.safetensors", "No such file"),
        ("fashon", "fashion"),
    ):
        with pytest.raises(UserError, match=reason):
            Tapt(statistics=statistics).wrap(classifier)
    with pytest.raises(UserError, match=r"\(4, 19, 128\).*\(2, 19, 128\)"):
        Tapt(statistics=str(statistics_file), depth=2).wrap(classifier)
