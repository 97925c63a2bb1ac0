"""COLA projects embeddings onto the span of the class texts and weighs views by their certainty."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from tests.defenses.fashion import fashion_batch, fashion_classifier
from tests.defenses.linear import Embedding, rng
from vlmdefend.defenses.training_free.cola import Cola
from vlmdefend.defenses.views.crops import augmented_views
from vlmdefend.models.zero_shot.classifier import ZeroShotClassifier
from vlmdefend.rng import ImageRng
from vlmdefend.types import Batch


@pytest.fixture(scope="module")
def classifier() -> ZeroShotClassifier:
    return fashion_classifier("tiny-vit")


@pytest.fixture(scope="module")
def batch() -> Batch:
    return fashion_batch(32)


def test_cola_weighs_the_projected_views_by_their_certainty(images: torch.Tensor) -> None:
    """Of every view: cosines after the projection onto the span of the texts, weight e^-H, and the weighted mean."""
    model = Embedding()
    views = augmented_views(images, rng(), 5)
    basis, _ = torch.linalg.qr(model.text_features.T)
    for image in range(4):
        logits, weights = [], []
        for view in views[image]:
            feature = basis @ (basis.T @ (model.weights @ view.flatten()))
            logits.append(10 * model.text_features @ (feature / feature.norm()))
            p = logits[-1].softmax(dim=0)
            weights.append(math.exp(float((p * p.log()).sum())))
        expected = sum(w * z for w, z in zip(weights, logits, strict=True)) / sum(weights)
        found = Cola(views=5).wrap(model)(images, rng()).logits[image]
        assert torch.allclose(found, expected, atol=1e-4)  # type: ignore[arg-type]


def test_cola_projects_onto_the_span_of_the_class_texts() -> None:
    texts = F.normalize(torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]]), dim=1)
    basis = Cola().basis(texts)
    assert basis.shape == (3, 2)
    assert torch.allclose(torch.tensor([[3.0, 4.0, 5.0]]) @ basis @ basis.T, torch.tensor([[3.0, 4.0, 0.0]]), atol=1e-5)
    leading = Cola(rank=1).basis(texts)
    middle = torch.tensor([math.cos(math.pi / 8), math.sin(math.pi / 8), 0.0])  # half-way between the two
    assert torch.allclose(leading[:, 0].abs(), middle, atol=1e-5)


def test_cola_with_one_view_scales_the_logits_by_what_the_projection_leaves_out(
    classifier: ZeroShotClassifier, batch: Batch
) -> None:
    """One view and no weights to speak of: the projection alone changes no prediction, since texts lie in the span."""
    with torch.no_grad():
        bare = classifier(batch.images).logits
        projected = Cola(views=1).wrap(classifier)(batch.images, ImageRng(0, batch.ids)).logits
    ratio = projected / bare
    assert torch.equal(projected.argmax(dim=1), bare.argmax(dim=1))
    assert torch.allclose(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-3)
    assert (ratio > 1.0).all()
