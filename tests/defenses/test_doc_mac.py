"""The successors of TTC are their formulas, and MAC's mild changes are those of its code."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF

from tests.defenses.linear import Linear
from vlmdefend.defenses._mild_changes import _blurred, _moved, _recoloured, _turned, mildly_changed
from vlmdefend.defenses.training_free.doc import Doc
from vlmdefend.defenses.training_free.mac import Mac
from vlmdefend.errors import UserError
from vlmdefend.evaluation.counting import Counted
from vlmdefend.rng import ImageRng

IDS = list("abcd")


def rng() -> ImageRng:
    return ImageRng(0, IDS)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Away from 0 and 1, so that no clamp interferes."""
    return 0.3 + 0.4 * torch.rand(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def weights() -> torch.Tensor:
    return torch.randn(2, 108, generator=torch.Generator().manual_seed(1))


def test_doc_widens_the_gradient_by_a_random_direction_at_right_angles(images: torch.Tensor) -> None:
    gradient = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(2))
    widened = Doc(aside=0.7).widened(gradient, rng()).flatten(1)
    along = F.normalize(gradient.flatten(1), dim=1)
    aside = widened - along
    assert torch.allclose((aside * along).sum(dim=1), torch.zeros(4), atol=1e-6)
    assert torch.allclose(aside.norm(dim=1), torch.full((4,), 0.7), atol=1e-5)
    assert torch.equal(Doc(aside=0.0).widened(gradient, rng()).flatten(1), along)
    assert (F.normalize(aside, dim=1)[0] @ F.normalize(aside, dim=1)[1]).abs() < 0.5  # each image has its own


def test_doc_climbs_with_momentum_and_mixes_by_its_gate(images: torch.Tensor, weights: torch.Tensor) -> None:
    """Features are pixels: the gradient of |delta| is along delta."""
    defense = Doc(draws=3, steps=3, aside=0.4, momentum=0.3, threshold=1e-3, sharpness=2000.0)
    found = defense.counter(Linear(weights), images, rng(), "cut")
    draws = rng()
    noise = draws.uniform((4, 3, 6, 6), -4 / 255, 4 / 255)
    first, mean = noise[:, 0], torch.zeros_like(images)
    delta = first
    for _ in range(3):
        mean = 0.3 * mean + 0.7 * defense.widened(delta, draws)
        delta = (delta + 3 / 255 * mean.sign()).clamp(-4 / 255, 4 / 255)
    flat = images.flatten(1)
    tau = 1 - torch.stack([F.cosine_similarity(flat + n.flatten(1), flat) for n in noise[:, 1:].unbind(1)]).mean(dim=0)
    w = torch.sigmoid(2000 * (1e-3 - tau)).view(-1, 1, 1, 1)
    assert float(w.min()) > 0.02  # the gate is half open: the mixture below is about something
    assert float(w.max()) < 0.98
    assert torch.allclose(found.images - images, w * delta + (1 - w) * first, atol=1e-5)
    assert found.detector_score is not None
    assert torch.allclose(found.detector_score, 1e-3 - tau, atol=1e-6)


def test_doc_costs_a_reference_the_gates_draws_its_steps_and_a_prediction(
    images: torch.Tensor, weights: torch.Tensor
) -> None:
    model = Counted(Linear(weights))
    with torch.no_grad():
        Doc(draws=3, steps=5).wrap(model)(images, rng())
    assert (model.forwards, model.backwards) == (4 * (1 + 3 + 5 + 1), 4 * 5)


def test_mac_goes_to_the_corner_of_its_ball_where_the_embedding_moves(
    images: torch.Tensor, weights: torch.Tensor
) -> None:
    """Features are pixels: four sign steps of eps / 4 along delta_0 end in the corner."""
    defense, model = Mac(threshold=-1.0, views=1), Linear(weights)
    found = defense.wrap(model)(images, rng())
    draws = rng()
    mildly_changed(images, draws)  # the further change
    noise = draws.uniform((3, 6, 6), -8 / 255, 8 / 255)
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
    noise = streams.uniform((3, 6, 6), -0.02, 0.02)
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
    model = Counted(Linear(weights))
    with torch.no_grad():
        Mac(views=3, steps=5).wrap(model)(images, rng())
    assert (model.forwards, model.backwards) == (4 * 3 * (2 + 5 + 1), 4 * 3 * 5)


@pytest.mark.parametrize("defense", [Doc(steps=2, draws=2, threshold=1e-3), Mac(steps=2, threshold=0.1)])
def test_the_detector_has_a_gradient_for_an_attacker_who_evades_it(
    defense: Doc | Mac, images: torch.Tensor, weights: torch.Tensor
) -> None:
    for stand_in in defense.surrogates(Linear(weights, bend=True)):
        pixels = images.clone().requires_grad_(True)
        score = stand_in(pixels, rng()).detector_score
        assert score is not None
        assert (torch.autograd.grad(score.sum(), pixels)[0].flatten(1).norm(dim=1) > 0).all()


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


def test_bad_use_is_said_in_a_sentence() -> None:
    for defense, options, reason in (
        (Doc, {"steps": 0}, "steps=0"),
        (Doc, {"momentum": 1.0}, "momentum=1"),
        (Mac, {"views": 0}, "views=0"),
        (Mac, {"temperature": 0.0}, "temperature=0"),
    ):
        with pytest.raises(UserError, match=reason):
            defense(**options)  # type: ignore[arg-type]
