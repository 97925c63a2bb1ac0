"""The input transforms do what they say, by values worked out by hand or by another implementation."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from vlmdefend.defenses import DEFENSES
from vlmdefend.defenses.training_free.bit_depth import BitDepth
from vlmdefend.defenses.training_free.blur import Blur
from vlmdefend.defenses.training_free.median import Median
from vlmdefend.defenses.training_free.random_pad import RandomPad
from vlmdefend.defenses.training_free.resize_pad import ResizePad
from vlmdefend.defenses.training_free.total_variation import TotalVariation
from vlmdefend.defenses.training_free.tte import Tte
from vlmdefend.defenses.views.resample import Span, axis_weights, resample, whole
from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng
from vlmdefend.types import Outputs


def noise(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


class Linear:
    """Logits are weighted sums of the pixels."""

    stochastic = False

    def __init__(self, pixels: int, classes: int = 3) -> None:
        self.num_classes = classes
        self.weights = noise(classes, pixels) - 0.5

    def __call__(self, images: torch.Tensor, rng: ImageRng) -> Outputs:
        return Outputs(images.flatten(1) @ self.weights.T, images.flatten(1))


def test_bit_depth_rounds_to_the_nearest_of_its_levels() -> None:
    values = torch.tensor([0.0, 0.16, 0.17, 0.49, 0.51, 0.84, 1.0]).view(1, 1, 1, 7)
    thirds = torch.tensor([0.0, 0.0, 1.0, 1.0, 2.0, 3.0, 3.0]).view(1, 1, 1, 7) / 3
    assert torch.allclose(BitDepth(bits=2).quantize(values), thirds)
    assert torch.equal(BitDepth(bits=1).quantize(values), (values > 0.5).float())


def test_the_attacker_of_bit_depth_sees_the_rounded_values_and_the_straight_gradient() -> None:
    images, model = noise(2, 3, 4, 4), Linear(48)
    pixels = images.clone().requires_grad_(True)
    outputs = BitDepth(bits=2).surrogate(model)(pixels, ImageRng(0, ["a", "b"]))
    assert torch.equal(outputs.logits, BitDepth(bits=2).quantize(images).flatten(1) @ model.weights.T)
    (gradient,) = torch.autograd.grad(outputs.logits[:, 1].sum(), pixels)
    assert torch.equal(gradient, model.weights[1].view(3, 4, 4).expand(2, -1, -1, -1))


def test_blur_spreads_a_point_as_a_gaussian_and_mirrors_at_the_edges() -> None:
    point = torch.zeros(1, 3, 15, 15)
    point[..., 7, 7] = 1.0
    line = torch.tensor([math.exp(-0.5 * (i - 7) ** 2) if abs(i - 7) <= 3 else 0.0 for i in range(15)])
    line /= line.sum()
    assert torch.allclose(Blur(sigma=1.0).blur(point)[0, 0], line[:, None] * line, atol=1e-6)
    images = noise(2, 3, 9, 9)
    padded = F.pad(images, (3, 3, 3, 3), mode="reflect")
    weights = line[4:11, None] * line[4:11]
    by_convolution = F.conv2d(padded, weights.expand(3, 1, 7, 7), groups=3)
    assert torch.allclose(Blur(sigma=1.0).blur(images), by_convolution, atol=1e-6)
    assert Blur(sigma=5.0).blur(noise(1, 3, 2, 1)).shape == (1, 3, 2, 1)


def test_median_takes_the_middle_of_nine() -> None:
    image = torch.tensor([[0.1, 0.9, 0.3], [0.8, 0.0, 0.7], [0.2, 0.6, 0.5]]).expand(1, 3, 3, 3)
    filtered = Median().filter(image)
    assert filtered[0, 0, 1, 1] == 0.5
    # the corner, mirrored: 0.0 four times in nine (0.0 0.8 0.0 / 0.9 0.1 0.9 / 0.0 0.8 0.0)
    assert filtered[0, 0, 0, 0] == pytest.approx(0.1)


def test_the_soft_median_gives_every_neighbour_of_the_median_a_gradient() -> None:
    """Nine pixels, all within one softness of the median: plain autograd sees one of them."""
    image = (0.5 + 0.002 * torch.arange(9.0).view(1, 1, 3, 3)).requires_grad_(True)
    (exact,) = torch.autograd.grad(Median().filter(image)[0, 0, 1, 1], image)
    (soft,) = torch.autograd.grad(Median().soft_filter(image)[0, 0, 1, 1], image)
    assert (exact != 0).sum() == 1
    assert (soft > 0.01).all()
    weights = torch.exp(-(torch.arange(9.0) - 4).abs() * 0.002 / (2 / 255))
    assert torch.allclose(soft.flatten(), weights / weights.sum(), atol=1e-4)


def test_total_variation_shrinks_the_two_halves_towards_each_other() -> None:
    """A step of height 1 between halves of 4 columns: the minimiser moves each half by weight / 4.

    Each row pays weight x jump for the edge and 4 x 1/2 move^2 for either half:
    2 x 4 x 1/2 m^2 + w (1 - 2 m) is least at m = w / 4.
    """
    image = torch.zeros(1, 3, 8, 8)
    image[..., 4:] = 1.0
    result = TotalVariation(weight=0.4, iterations=2000).denoise(image)
    assert torch.allclose(result[..., :4], torch.tensor(0.1), atol=1e-3)
    assert torch.allclose(result[..., 4:], torch.tensor(0.9), atol=1e-3)


def test_total_variation_lowers_what_it_minimises_and_keeps_the_mean() -> None:
    images, weight = noise(2, 3, 16, 16), 0.1

    def objective(u: torch.Tensor) -> float:
        down, across = torch.zeros_like(u), torch.zeros_like(u)
        down[..., :-1, :], across[..., :-1] = u.diff(dim=-2), u.diff(dim=-1)
        return float(0.5 * (u - images).square().sum() + weight * (down**2 + across**2).sqrt().sum())

    ours, best = TotalVariation(weight=weight).denoise(images), TotalVariation(weight=weight, iterations=3000)
    least = objective(best.denoise(images))
    assert least < objective(images)
    assert objective(ours) - least < 0.02 * (objective(images) - least)
    assert torch.allclose(ours.mean(dim=(2, 3)), images.mean(dim=(2, 3)), atol=1e-5)


def test_the_gradient_through_total_variation_is_that_of_finite_differences() -> None:
    images = noise(1, 1, 5, 5).double()
    images[..., :2, :2] = 0.5  # flat: the length of the dual is zero there at first
    transform = TotalVariation(weight=0.07, iterations=5).denoise
    assert torch.autograd.gradcheck(transform, images.requires_grad_(True), eps=1e-6, atol=1e-5)


@pytest.mark.parametrize(("source", "target"), [((5, 11), (0, 32)), ((0, 32), (3, 25)), ((7, 20), (1, 13))])
def test_resampling_a_box_is_what_torch_does_with_the_crop(source: tuple[int, int], target: tuple[int, int]) -> None:
    image = noise(1, 3, 32, 32)
    span = [Span(torch.tensor([first]), torch.tensor([length])) for first, length in (source, target)]
    weights = axis_weights(32, *span)
    crop = image[..., source[0] : sum(source), source[0] : sum(source)]
    expected = F.interpolate(crop, (target[1], target[1]), mode="bilinear", antialias=True)
    found = resample(image, weights, weights)
    inside = slice(target[0], sum(target))
    assert torch.allclose(found[..., inside, inside], expected, atol=1e-5)
    found[..., inside, inside] = 0
    assert not found.any()


def test_weights_of_all_to_all_are_the_identity() -> None:
    span = whole(9, torch.zeros(2))
    assert torch.equal(axis_weights(9, span, span), torch.eye(9).expand(2, 9, 9))


def test_resize_pad_shrinks_within_its_limits_and_fills_the_rest() -> None:
    rng = ImageRng(0, [str(i) for i in range(64)])
    placed = ResizePad(smallest=0.5, fill=0.25).place(torch.ones(64, 3, 12, 12), rng)
    inside = (placed - 1).abs() < 1e-6
    assert (inside | (placed == 0.25)).all()
    sides, widths = inside[:, 0].any(dim=2).sum(dim=1), inside[:, 0].any(dim=1).sum(dim=1)
    assert torch.equal(sides, widths)
    assert set(sides.tolist()) == set(range(6, 13))
    corners = {tuple(image.nonzero()[0].tolist()) for image in inside[:, 0]}
    assert (0, 0) in corners
    assert len(corners) > 20


def test_random_pad_keeps_the_image_in_the_middle_of_fresh_dark_pixels() -> None:
    images, defense = torch.ones(2, 3, 36, 36), RandomPad(border=0.25, brightest=0.1)
    rng = ImageRng(0, ["a", "b"])
    first, second = defense.pad(images, rng), defense.pad(images, rng)
    middle = slice(6, 30)  # 36 / (1 + 2 x 0.25) = 24
    assert torch.allclose(first[..., middle, middle], torch.tensor(1.0))
    border = torch.ones(36, 36, dtype=torch.bool)
    border[middle, middle] = False
    assert first[..., border].max() <= 0.1
    assert first[..., border].mean() == pytest.approx(0.05, abs=0.003)
    assert not torch.equal(first[..., border], second[..., border])


def test_tte_averages_image_crops_and_their_flips() -> None:
    images, model = noise(2, 3, 16, 16), Linear(3 * 16 * 16)
    defense = Tte(crops=3)
    views = defense.views(images)
    assert views.shape == (2, 8, 3, 16, 16)
    assert torch.equal(views[:, 0], images)
    assert torch.equal(views[:, 4:], views[:, :4].flip(-1))
    for view in views[:, 1:4].unbind(dim=1):  # a shift by at most 16 x 4 / 32 pixels, zeros come in
        padded = F.pad(images, (2, 2, 2, 2))
        shifts = [(i, j) for i in range(5) for j in range(5) if torch.equal(view, padded[..., i : i + 16, j : j + 16])]
        assert len(shifts) == 1
    found = defense.wrap(model)(images, ImageRng(0, ["a", "b"]))
    assert torch.allclose(found.logits, torch.stack([v.flatten(1) @ model.weights.T for v in views.unbind(1)]).mean(0))


def test_tte_can_repeat_the_one_crop_of_the_official_code() -> None:
    images = noise(1, 3, 32, 32)
    ours, official = Tte(flip=False).views(images), Tte(flip=False, same_crop=True).views(images)
    assert not all(torch.equal(ours[:, 1], ours[:, i]) for i in (2, 3, 4))
    assert all(torch.equal(ours[:, 4], official[:, i]) for i in (1, 2, 3, 4))


@pytest.mark.parametrize(
    "spec",
    [
        "bit_depth:bits=0",
        "blur:sigma=-1",
        "median:size=4",
        "total_variation:weight=-1",
        "total_variation:iterations=0",
        "resize_pad:smallest=0",
        "random_pad:border=-0.1",
        "tte:crops=-1",
        "ensemble:views=0",
        "ensemble:keep=0",
        "mta:rounds=0",
        "mta:sharpness=0",
        "randomized_smoothing:sigma=0",
        "randomized_smoothing:alpha=1",
    ],
)
def test_impossible_settings_are_refused_by_name(spec: str) -> None:
    with pytest.raises(UserError, match=f"^{spec.partition(':')[0]}: .*{spec.partition(':')[2].partition('=')[0]}"):
        DEFENSES.create(spec)


def test_a_window_larger_than_the_image_is_refused() -> None:
    with pytest.raises(UserError, match="too large"):
        Median(size=9).filter(noise(1, 3, 4, 4))
