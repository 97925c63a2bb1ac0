"""BPDA: the outputs of one pipeline, the gradient of another."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.attacks.conftest import Noisy, Wrapped, convolutional, labelled
from vlmdefend.attacks.bpda import Bpda
from vlmdefend.attacks.criterion import Criterion
from vlmdefend.attacks.gradient.pgd import Pgd
from vlmdefend.attacks.losses import LOSSES
from vlmdefend.attacks.view import View
from vlmdefend.rng import ImageRng
from vlmdefend.types import Outputs, Threat

SHAPE = (3, 8, 8)


def test_bpda_has_the_outputs_of_one_pipeline_and_the_gradient_of_the_other(conv: Wrapped) -> None:
    other = convolutional(seed=4)
    images, _, ids = labelled(conv, SHAPE, 4)
    pipeline = Bpda(conv, other)
    rng = ImageRng(0, ids)
    pixels = images.clone().requires_grad_(True)
    outputs = pipeline(pixels, rng)
    assert torch.equal(outputs.logits, conv(images).logits)
    assert outputs.features is not None
    assert torch.equal(outputs.features, conv(images).features)
    weights = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    found = torch.autograd.grad((outputs.logits * weights).sum(), pixels)[0]
    pixels = images.clone().requires_grad_(True)
    assert torch.equal(found, torch.autograd.grad((other(pixels).logits * weights).sum(), pixels)[0])
    assert outputs.detector_score is None
    assert pipeline.num_classes == 5
    assert not pipeline.stochastic


def test_bpda_sees_through_a_pipeline_that_cuts_the_gradient(conv: Wrapped) -> None:
    class Cut(Wrapped):
        def forward(self, images: Tensor, rng: ImageRng | None = None) -> Outputs:
            with torch.no_grad():
                return Wrapped.forward(self, (images * 255).round() / 255, rng)

    images, labels, ids = labelled(conv, SHAPE, 12)
    deployed = Cut(conv.body, conv.head).eval()
    threat = Threat("linf", 8 / 255)
    blind = Pgd(random_start=False)(View(deployed, ImageRng(0, ids)), images, labels, threat)
    seeing = Pgd(random_start=False)(View(Bpda(deployed, conv), ImageRng(0, ids)), images, labels, threat)
    assert not blind.fooled.any()
    assert seeing.fooled.any()


def test_bpda_shows_both_pipelines_the_same_draws(conv: Wrapped) -> None:
    conv.__class__ = Noisy
    images, labels, ids = labelled(convolutional(), SHAPE, 3)
    own = View(conv, ImageRng(0, ids)).gradient(images, Criterion(labels), LOSSES["cw"])
    both = View(Bpda(conv, conv), ImageRng(0, ids)).gradient(images, Criterion(labels), LOSSES["cw"])
    assert torch.equal(own.logits, both.logits)
    assert torch.equal(own.pixels, both.pixels)
    view = View(Bpda(conv, conv), ImageRng(0, ids))
    assert not torch.equal(view(images), view(images))
