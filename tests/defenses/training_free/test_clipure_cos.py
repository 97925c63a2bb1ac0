"""CLIPure-Cos is its formula, and at its published setting it does nothing but hide the gradient."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vlmdefend
from tests.defenses.fashion import fashion_batch, fashion_classifier
from vlmdefend.data.prompts import templates_for
from vlmdefend.defenses.training_free.clipure_cos import ClipureCos
from vlmdefend.errors import UserError
from vlmdefend.evaluation.cell.query_count import CountingModel
from vlmdefend.evaluation.statistics.diagnostics import Result, reasons
from vlmdefend.models.zero_shot.classifier import ZeroShotClassifier
from vlmdefend.rng import ImageRng
from vlmdefend.types import Batch, Pipeline

BLANK = torch.tensor([0.0, 1.0])


@pytest.fixture(scope="module")
def classifier() -> ZeroShotClassifier:
    return fashion_classifier("tiny-vit")


@pytest.fixture(scope="module")
def batch() -> Batch:
    return fashion_batch(32)


def at_angle(degrees: float) -> Tensor:
    """(1, 2) unit vector at this angle from BLANK."""
    return torch.tensor([[math.sin(math.radians(degrees)), math.cos(math.radians(degrees))]])


def angle(vectors: Tensor) -> float:
    return math.degrees(math.atan2(vectors[0, 0].item(), vectors[0, 1].item()))


@pytest.mark.parametrize(("steps", "expected"), [(1, 78.46 - 88.09), (2, 78.46), (3, 78.46 - 88.09), (10, 78.46)])
def test_a_clipure_step_turns_by_88_degrees_past_the_blank_text_and_the_next_one_back(
    steps: int, expected: float
) -> None:
    """CLIP's images lie at a cosine of about 0.2 to the blank text: 78.46 degrees."""
    assert angle(ClipureCos(steps=steps).purify(at_angle(78.46), BLANK)) == pytest.approx(expected, abs=0.01)


def test_two_clipure_steps_are_not_the_identity_further_than_88_degrees_from_the_blank_text() -> None:
    assert angle(ClipureCos(steps=2).purify(at_angle(100.0), BLANK)) == pytest.approx(100 - 2 * 88.09, abs=0.01)


def test_an_even_number_of_clipure_steps_is_the_identity_and_an_odd_number_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    blank = F.normalize(torch.randn(64, generator=generator).double(), dim=0)
    features = F.normalize(torch.randn(50, 64, generator=generator).double(), dim=1) + 0.3 * blank
    units = F.normalize(features, dim=1)
    inside = units @ blank > 1 / 901**0.5
    assert 40 <= inside.sum() < 50
    for steps in (2, 10):
        error = (ClipureCos(steps=steps).purify(features, blank) - units).abs().amax(dim=1)
        assert (error[inside] < 1e-8).all()
        assert (error[~inside] > 0.1).all()
    assert not torch.allclose(ClipureCos(steps=9).purify(features, blank)[inside], units[inside], atol=0.1)


def test_clipure_stays_in_the_plane_of_embedding_and_blank_text() -> None:
    generator = torch.Generator().manual_seed(0)
    blank = F.normalize(torch.randn(8, generator=generator), dim=0)
    features = F.normalize(torch.randn(1, 8, generator=generator), dim=1)
    out = ClipureCos(steps=3, eta=0.7).purify(features, blank)
    basis, _ = torch.linalg.qr(torch.stack([features[0], blank], dim=1))  # (8, 2)
    assert torch.allclose(out @ basis @ basis.T, out, atol=1e-6)
    assert not torch.allclose(out, features, atol=0.1)


def test_only_the_batch_norm_of_the_official_code_depends_on_batch_mates() -> None:
    generator = torch.Generator().manual_seed(0)
    blank = F.normalize(torch.randn(16, generator=generator), dim=0)
    features = torch.randn(8, 16, generator=generator)
    sample, official = ClipureCos(steps=1, eta=1.0), ClipureCos(steps=1, eta=1.0, norm="batch")
    assert torch.allclose(sample.purify(features, blank)[:1], sample.purify(features[:1], blank), atol=1e-6)
    assert not torch.allclose(official.purify(features, blank)[:1], official.purify(features[:1], blank), atol=0.1)
    assert torch.allclose(official.purify(features[:1], blank), sample.purify(features[:1], blank), atol=1e-6)


def pixel_gradient(pipeline: Pipeline, batch: Batch) -> Tensor:
    pixels = batch.images.clone().requires_grad_(True)
    loss = F.cross_entropy(pipeline(pixels, ImageRng(0, batch.ids)).logits, batch.labels, reduction="sum")
    return torch.autograd.grad(loss, pixels)[0].flatten(1)


def test_clipure_as_published_hides_the_gradient_and_with_its_graph_it_is_the_bare_models(
    classifier: ZeroShotClassifier, batch: Batch
) -> None:
    defense = ClipureCos(anchor="classes")
    bare = pixel_gradient(classifier, batch)
    masked = pixel_gradient(defense.wrap(classifier), batch)
    true = pixel_gradient(defense.surrogate(classifier), batch)
    assert (masked.norm(dim=1) < 1e-4 * bare.norm(dim=1)).all()
    assert F.cosine_similarity(masked, bare).mean().abs() < 0.3
    assert torch.allclose(true, bare, rtol=1e-2, atol=1e-3 * bare.abs().max().item())
    assert torch.equal(true, pixel_gradient(ClipureCos(anchor="classes", create_graph=True).wrap(classifier), batch))


def test_transfer_examples_break_clipure_where_its_own_gradient_does_not(tmp_path: Path) -> None:
    """The embedded models' images lie further than 88 degrees from the blank text; so the anchor is the classes' mean.

    Clean accuracy is exactly the bare model's, and so is what the bare model's adversarial examples leave.
    """
    options = {"eps": "8/255", "limit": 80, "threads": 1}
    found = vlmdefend.evaluate(tmp_path, defense=["none", "clipure_cos:anchor=classes"], **options)
    share = {
        (record.cell.defense, record.cell.attacker): (record.clean_correct / record.n, record.robust / record.n)
        for record, _ in found.results
    }
    bare, defended = share["none", "whitebox"], {a: s for (d, a), s in share.items() if d == "clipure_cos"}
    assert all(clean == bare[0] for clean, _ in defended.values())
    assert defended["transfer"][1] == pytest.approx(bare[1], abs=0.03)
    assert defended["adaptive"][1] == pytest.approx(bare[1], abs=0.03)
    assert defended["whitebox"][1] > bare[1] + 0.3
    said = reasons([Result(*r) for r in found.results if r[0].cell.defense == "clipure_cos"])
    assert any(reason.kind == "transfer whitebox" for reason in said)


def test_clipure_without_a_text_tower_points_to_the_other_anchor(classifier: ZeroShotClassifier) -> None:
    mute = ZeroShotClassifier(
        classifier.clip, classifier.text_features, mean=[0, 0, 0], std=[1, 1, 1], image_size=classifier.image_size
    )
    with pytest.raises(UserError, match="anchor=classes"):
        ClipureCos().wrap(mute)
    ClipureCos(anchor="classes").wrap(mute)


def test_the_blank_text_is_the_unit_mean_of_80_templates_without_a_class() -> None:
    model = vlmdefend.load_model("tiny-vit", device="cpu")
    prompts = [template.replace("{c}", "") for template in templates_for("imagenet")]
    assert len(prompts) == 80
    assert "a photo of a ." in prompts
    with torch.no_grad():
        units = F.normalize(model.clip.encode_text(model.tokenizer(prompts)), dim=1)
    assert torch.allclose(model.blank_text_features(), F.normalize(units.mean(dim=0), dim=0), atol=1e-5)
    assert model.blank_text_features() is not None
    assert torch.equal(CountingModel(model.zero_shot(["cat"], ["{c}"])).blank_features, model.blank_text_features())
