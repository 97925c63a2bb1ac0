"""CSR is its formula, and pays for suspect images alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.defenses.linear import Linear, rng
from vlmdefend.defenses.training_free.csr import Csr
from vlmdefend.defenses.training_free.low_pass import LowPass
from vlmdefend.evaluation.cell.query_count import CountingModel


def test_csr_steps_from_the_image_towards_its_low_pass_version(images: torch.Tensor, weights: torch.Tensor) -> None:
    """d/dx cos(x, l) - cos(x, x_0) at x_0 is the part of l / |l| that is orthogonal to x_0."""
    defense = Csr(threshold=1.0, alpha=0.001, steps=1, radius=0.2)
    smooth = F.normalize(LowPass(radius=0.2).filter(images).flatten(1), dim=1)
    own = F.normalize(images.flatten(1), dim=1)
    direction = (smooth - own) - ((smooth - own) * own).sum(dim=1, keepdim=True) * own
    seen = defense.counter(Linear(weights), images, rng(), "cut").images
    assert torch.allclose(seen, images + 0.001 * direction.sign().view_as(images), atol=1e-6)


def test_csr_leaves_alone_what_agrees_and_pays_nothing_for_it(images: torch.Tensor, weights: torch.Tensor) -> None:
    agreement = F.cosine_similarity(images.flatten(1), LowPass(radius=0.2).filter(images).flatten(1))
    middle = agreement.sort().values[1:3].mean().item()
    model = CountingModel(Linear(weights))
    found = Csr(threshold=middle, radius=0.2).counter(model, images, rng(), "cut")
    changed = (found.images != images).flatten(1).any(dim=1)
    assert torch.equal(changed, agreement < middle)
    assert (model.forwards, model.backwards) == (2 * 4 + 4 * 2, 3 * 2)
    assert (found.images - images).abs().max() <= 4 / 255 + 1e-6


def test_csr_keeps_the_best_image_on_the_way(images: torch.Tensor, weights: torch.Tensor) -> None:
    """Steps far too long overshoot; one more step must never leave it with less than it had."""
    smooth = F.normalize(LowPass(radius=0.2).filter(images).flatten(1), dim=1)
    own = F.normalize(images.flatten(1), dim=1)

    def gain(steps: int) -> torch.Tensor:
        defense = Csr(threshold=1.0, eps=1.0, alpha=0.4, steps=steps, radius=0.2)
        seen = defense.counter(Linear(weights), images, rng(), "cut").images
        return (F.normalize(seen.flatten(1), dim=1) * (smooth - own)).sum(dim=1)

    gains = torch.stack([gain(steps) for steps in range(6)])
    assert (gains.diff(dim=0) >= -1e-6).all()
    assert (gains[-1] == gains[-2]).any()  # a last step that was not worth keeping
