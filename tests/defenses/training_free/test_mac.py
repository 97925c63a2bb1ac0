"""MAC is its formula, and its mild changes are those of its code."""

from __future__ import annotations

import math

import torch
import torchvision.transforms.functional as TF

from tests.defenses.linear import SIZE, Linear, rng
from vlmdefend.defenses.training_free.mac import Mac
from vlmdefend.defenses.views.mild_changes import _blurred, _moved, _recoloured, _turned, mildly_changed
from vlmdefend.evaluation.cell.query_count import CountingModel
from vlmdefend.rng import ImageRng


def test_mac_goes_to_the_corner_of_its_ball_where_the_embedding_moves(
    images: torch.Tensor, weights: torch.Tensor
) -> None:
    """Features are pixels: four sign steps of eps / 4 along delta_0 end in the corner."""
    defense, model = Mac(threshold=-1.0, views=1), Linear(weights)
    found = defense.wrap(model)(images, rng())
    draws = rng()
    mildly_changed(images, draws)  # the further change
    noise = draws.uniform((3, SIZE, SIZE), -8 / 255, 8 / 255)
    expected = images + 8 / 255 * noise.sign()
    assert found.features is not None
    assert torch.allclose(found.features, expected.flatten(1), atol=1e-5)
    assert torch.allclose(found.logits, model(expected).logits, atol=1e-4)


def test_macs_gate_by_hand_and_the_mean_over_its_views(images: torch.Tensor, weights: torch.Tensor) -> None:
    draws = rng()
    changed = mildly_changed(images, draws)
    views = torch.stack([images, changed], dim=1).flatten(0, 1)
    streams = draws.select([0, 0, 1, 1, 2, 2, 3, 3])
    further = mildly_changed(views, streams)
    corruption = (further - views).flatten(1).norm(dim=1) / views.flatten(1).norm(dim=1)
    threshold = corruption.median().item()
    noise = streams.uniform((3, SIZE, SIZE), -0.02, 0.02)
    w = torch.sigmoid((corruption - threshold) / 0.01).view(-1, 1, 1, 1)
    moved = (views + (noise + 4 * 0.005 * noise.sign()).clamp(-0.02, 0.02)).clamp(0.0, 1.0)
    model = Linear(weights)
    expected = model(views + w * (moved - views)).logits.view(4, 2, 2).mean(dim=1)
    found = Mac(eps=0.02, threshold=threshold).wrap(model)(images, rng())
    assert torch.allclose(found.logits, expected, atol=1e-3)
    assert found.detector_score is not None
    assert torch.allclose(found.detector_score, corruption.view(4, 2).mean(dim=1) - threshold, atol=1e-5)
    assert 0.1 < float(w.mean()) < 0.9


def test_mac_costs_two_forwards_its_steps_and_a_prediction_of_each_view(
    images: torch.Tensor, weights: torch.Tensor
) -> None:
    model = CountingModel(Linear(weights))
    with torch.no_grad():
        Mac(views=3, steps=5).wrap(model)(images, rng())
    assert (model.forwards, model.backwards) == (4 * 3 * (2 + 5 + 1), 4 * 3 * 5)


def photo(size: int = 48) -> torch.Tensor:
    place = torch.linspace(0, 1, size)
    waves = [torch.sin(3 * place[:, None] + k * place) * 0.3 + 0.2 + 0.1 * k for k in range(3)]
    return torch.stack(waves).clamp(0, 1).expand(2, -1, -1, -1)


def test_mild_changes_are_those_of_torchvision() -> None:
    image = photo()
    signed = torch.tensor([[0.5, -1.0, 1.0]]).expand(2, -1)
    expected = TF.adjust_brightness(image, 1 + 0.08 * 0.5)
    expected = TF.adjust_saturation(TF.adjust_contrast(expected, 1 - 0.08), 1.08)
    assert torch.allclose(_recoloured(image, signed), expected, atol=2e-3)  # its grey has rounded weights
    for sigma in (0.5, 1.2):
        expected = TF.gaussian_blur(image, [5, 5], [sigma, sigma])
        assert torch.allclose(_blurred(image, torch.full((2,), sigma)), expected, atol=1e-5)
    inner = (..., slice(8, -8), slice(8, -8))
    turned = TF.rotate(image, 5.0, TF.InterpolationMode.BILINEAR)
    assert torch.allclose(_turned(image, torch.full((2,), math.radians(5)))[inner], turned[inner], atol=2 / 255)
    grown = TF.affine(image, 0.0, [4, 2], 1.08, [0.0, 0.0], TF.InterpolationMode.BILINEAR)
    found = _moved(image, torch.full((2,), 1.08), torch.full((2,), 2 / 48), torch.full((2,), 4 / 48))
    assert torch.allclose(found[inner], grown[inner], atol=2 / 255)
    assert (grown - image)[inner].abs().max() > 10 / 255


def test_every_image_is_changed_in_its_own_way_whoever_its_mates_are() -> None:
    images = photo(24)[:1].expand(30, -1, -1, -1)
    ids = [str(i) for i in range(30)]
    together = mildly_changed(images, ImageRng(0, ids))
    assert (together[1:] - together[:1]).abs().flatten(1).amax(dim=1).min() > 1e-3
    assert torch.allclose(mildly_changed(images[7:8], ImageRng(0, ids[7:8])), together[7:8], atol=1e-6)
    assert together.min() >= 0
    assert together.max() <= 1 + 1e-6
    assert (together - images)[..., 6:-6, 6:-6].abs().mean() < 0.06  # mild
