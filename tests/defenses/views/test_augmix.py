"""AugMix is its algorithm for every view by itself, and its operations are those of its official code."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image, ImageOps

from tests.defenses.fashion import fashion_classifier
from vlmdefend.defenses import DEFENSES
from vlmdefend.defenses.views.augmix import (
    DRAWS,
    OPERATIONS,
    Operation,
    augmix,
    autocontrast,
    equalized,
    posterized,
    rotated,
    sheared,
    slide,
    solarized,
    translated,
    upright,
)
from vlmdefend.defenses.views.crops import augmented_views
from vlmdefend.rng import ImageRng


def photo(size: int = 48) -> torch.Tensor:
    """(1, 3, S, S) smooth, on the 256 levels."""
    place = torch.linspace(0, 1, size)
    waves = [torch.sin(3 * place[:, None] + k * place) * 0.3 + 0.2 + 0.1 * k for k in range(3)]
    return (255 * torch.stack(waves).clamp(0, 1)).round()[None] / 255


def pillow(images: torch.Tensor) -> Image.Image:
    return Image.fromarray((255 * images[0]).round().byte().permute(1, 2, 0).numpy())


def tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255


def run(operation: Operation, images: torch.Tensor, level: float, sign: float = 1.0) -> torch.Tensor:
    return operation(images, torch.full((len(images),), level), torch.full((len(images),), sign))


@pytest.mark.parametrize("level", [0.0, 0.1, 0.3, 0.8])
def test_operations_on_levels_are_those_of_pillow(level: float) -> None:
    images = photo()
    assert torch.allclose(run(equalized, images, level), tensor(ImageOps.equalize(pillow(images))), atol=1e-6)
    contrast = tensor(ImageOps.autocontrast(pillow(images)))
    assert torch.allclose(run(autocontrast, images, level), contrast, atol=1.01 / 255)  # rounded there
    bits = 4 - int(4 * level)
    assert torch.allclose(run(posterized, images, level), tensor(ImageOps.posterize(pillow(images), bits)), atol=1e-6)
    above = tensor(ImageOps.solarize(pillow(images), 256 - int(256 * level)))
    assert torch.allclose(run(solarized, images, level), above, atol=1e-6)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_operations_on_places_are_those_of_pillow(sign: float) -> None:
    images, inner = photo(), (..., slice(12, -12), slice(12, -12))
    size, shear = (48, 48), sign * 0.3 * 0.5
    bilinear = {"resample": Image.Resampling.BILINEAR}
    for operation, matrix in (
        (sheared, (1, shear, 0, 0, 1, 0)),
        (upright(sheared), (1, 0, 0, shear, 1, 0)),
        (translated, (1, 0, sign * 8, 0, 1, 0)),
        (upright(translated), (1, 0, 0, 0, 1, sign * 8)),
    ):
        expected = tensor(pillow(images).transform(size, Image.Transform.AFFINE, matrix, **bilinear))
        assert torch.allclose(run(operation, images, 0.5, sign)[inner], expected[inner], atol=2 / 255)
    turned = TF.rotate(images, sign * 15, TF.InterpolationMode.BILINEAR)
    assert torch.allclose(run(rotated, images, 0.5, sign)[inner], turned[inner], atol=2 / 255)
    assert (run(rotated, images, 0.5, sign) - images)[inner].abs().max() > 10 / 255


def test_a_row_slides_by_any_number_of_pixels_and_zeros_come_in() -> None:
    row = torch.tensor([[[[1.0, 2.0, 4.0], [1.0, 2.0, 4.0]]]])
    found = slide(row, torch.tensor([[0.5, -1.25]]))
    assert found[0, 0].tolist() == [[1.5, 3.0, 2.0], [0.0, 0.75, 1.75]]
    assert torch.equal(slide(row, torch.zeros(1, 2)), row)


def test_a_flat_image_survives_every_operation() -> None:
    flat = torch.full((1, 3, 8, 8), 100 / 255)
    for operation in (autocontrast, equalized):
        assert torch.allclose(run(operation, flat, 0.5), flat, atol=1e-6)


def draws(*, keep: float, weights: tuple[float, ...], depths: tuple[int, ...], chosen: list[list[int]]) -> torch.Tensor:
    """(1, DRAWS) numbers that say: levels at the weakest, signs positive."""
    exponential = [1 - math.exp(-w) for w in weights]
    steps = [
        number for chain in chosen for operation in chain for number in ((operation + 0.5) / len(OPERATIONS), 0.0, 0.9)
    ]
    return torch.tensor([[*exponential, keep, *((d - 0.5) / 3 for d in depths), *steps]])


def test_the_mixture_by_hand() -> None:
    """Weights 1/2, 1/4, 1/4 and m = 1/5; a chain stops at its depth."""
    images = photo()
    chosen = [[0, 4, 4], [2, 2, 0], [3, 2, 2]]
    found = augmix(images, draws(keep=0.2, weights=(2.0, 1.0, 1.0), depths=(1, 1, 2), chosen=chosen))
    weakest = 0.01
    first, second = run(autocontrast, images, weakest), run(posterized, images, weakest)
    third = run(posterized, run(rotated, images, weakest), weakest)  # int(0.3) degrees: no rotation at all
    assert torch.equal(run(rotated, images, weakest), images)
    expected = 0.2 * images + 0.8 * (0.5 * first + 0.25 * second + 0.25 * third)
    assert torch.allclose(found, expected, atol=1e-5)
    assert (found - images).abs().max() > 0.01


def test_every_view_has_its_own_chains_and_mates_do_not_matter() -> None:
    numbers = torch.rand(40, DRAWS, generator=torch.Generator().manual_seed(0))
    images = photo().expand(40, -1, -1, -1)
    together = augmix(images, numbers)
    assert torch.allclose(together[7:8], augmix(images[7:8], numbers[7:8]), atol=1e-6)
    assert (together[1:] - together[:1]).abs().flatten(1).amax(dim=1).min() > 0
    assert together.min() >= 0
    assert together.max() <= 1 + 1e-5


def test_severity_is_tenths_of_the_strongest() -> None:
    """All chains rotate by a level drawn at 1/2 of [0.1, severity]: a strength of 0.505 at severity 10."""
    numbers = draws(keep=0.0, weights=(1.0, 1.0, 1.0), depths=(1, 1, 1), chosen=[[3, 0, 0]] * 3)
    numbers[:, 8::3] = 0.5
    images = photo()
    assert torch.allclose(augmix(images, numbers, 10.0), run(rotated, images, 0.505), atol=1e-5)
    assert not torch.allclose(augmix(images, numbers, 5.0), run(rotated, images, 0.505), atol=1e-2)


def test_a_gradient_reaches_the_pixels_through_every_operation() -> None:
    images = photo().requires_grad_(True)
    for operation in OPERATIONS:
        (gradient,) = torch.autograd.grad(run(operation, images, 0.3).sum(), images)
        assert gradient.isfinite().all()
        assert (gradient != 0).float().mean() > 0.5


def test_views_may_be_mixed_and_the_crops_stay_the_same_draws() -> None:
    images = photo(24).expand(2, -1, -1, -1)
    plain, mixed = (augmented_views(images, ImageRng(0, ["a", "b"]), 6, mixed=on) for on in (False, True))
    assert torch.equal(mixed[:, 0], images)
    assert (mixed[:, 1:] - plain[:, 1:]).abs().flatten(2).amax(dim=2).min() > 1e-3
    assert (mixed[:, 1:] - plain[:, 1:]).abs().mean() < 0.2
    alone = augmented_views(images[1:], ImageRng(0, ["b"]), 6, mixed=True)
    assert torch.allclose(alone[0], mixed[1], atol=1e-6)


@pytest.mark.parametrize("name", ["tpt", "c_tpt", "r_tpt", "tapt", "ensemble"])
def test_who_is_published_with_mixed_views_takes_the_option(name: str) -> None:
    classifier, images = fashion_classifier("tiny-rn"), photo(32)
    plain, mixed = (
        DEFENSES.create(f"{name}:views=12:augmix={on}").wrap(classifier)(images, ImageRng(0, ["a"])).logits
        for on in ("no", "yes")
    )
    assert not torch.equal(plain, mixed)
