"""DOC is its formula, and costs what it says."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.defenses.linear import SIZE, Linear, rng
from vlmdefend.defenses.training_free.doc import Doc
from vlmdefend.evaluation.cell.query_count import CountingModel


def test_doc_widens_the_gradient_by_a_random_direction_at_right_angles(images: torch.Tensor) -> None:
    gradient = torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
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
    noise = draws.uniform((4, 3, SIZE, SIZE), -4 / 255, 4 / 255)
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
    model = CountingModel(Linear(weights))
    with torch.no_grad():
        Doc(draws=3, steps=5).wrap(model)(images, rng())
    assert (model.forwards, model.backwards) == (4 * (1 + 3 + 5 + 1), 4 * 5)
