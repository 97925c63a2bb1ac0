"""The 15 common corruptions: hand-computed values, their severities, their streams."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import torch
from PIL import Image
from torch import Tensor

from tests.attacks.conftest import convolutional, labelled
from vlmdefend.attacks.corruptions._blur import disk, sources
from vlmdefend.attacks.corruptions._digital import (
    CORRUPTIONS,
    LARGE_IMAGES,
    SMALL_IMAGES,
    brightness,
    contrast,
    corrupt,
)
from vlmdefend.attacks.corruptions._filters import blurred, box_matrix, inside, motion_blurred, zoomed
from vlmdefend.attacks.corruptions._weather import fog, plasma
from vlmdefend.attacks.corruptions.corruption import KINDS, Corruption
from vlmdefend.attacks.view import View
from vlmdefend.data import load_dataset
from vlmdefend.data.loader import load_batch
from vlmdefend.data.transforms import PixelTransform
from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng
from vlmdefend.types import Outputs, Threat

every_kind = pytest.mark.parametrize("kind", KINDS)
# The published parameters change what is done rather than how much: fewer passes with a wider blur, a smaller warp
# with sharper bends, paler ice on a darker picture. No order of these severities is promised.
UNORDERED = {"glass_blur", "elastic_transform", "frost"}


def pictures(count: int = 8, size: int = 32) -> Tensor:
    """Smooth coloured shapes with edges, some of it black and white, some saturated."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1)
    smooth[:, :, size // 4 : size // 2, size // 4 : size // 2] = coarse[:, :, :1, :1].round()
    return smooth


def streams(count: int = 8, seed: int = 0) -> ImageRng:
    return ImageRng(seed, [f"image-{i}" for i in range(count)])


def perturbed(images: Tensor, severity: float | Tensor, kind: str = "random", ids: list[str] | None = None) -> Tensor:
    names = [f"image-{i}" for i in range(len(images))] if ids is None else ids
    rng = ImageRng(0, names)
    model = convolutional()
    attack = Corruption(kind=kind)  # type: ignore[arg-type]
    labels = torch.zeros(len(images), dtype=torch.int64)
    return attack.perturb(View(model, rng, width=3), images, labels, Threat("corruption", severity), rng)


# all fifteen


@every_kind
@pytest.mark.parametrize("size", [8, 32, 96])
def test_images_stay_images_at_every_severity(kind: str, size: int) -> None:
    images = pictures(3, size)
    before = images.clone()
    for severity in range(1, 6):
        found = corrupt(kind, images, severity, streams(3))
        assert found.shape == images.shape
        assert found.dtype == torch.float32
        assert found.isfinite().all()
        assert found.min() >= 0
        assert found.max() <= 1
        assert not torch.equal(found, images) or size == 8
    assert torch.equal(images, before)


@every_kind
@pytest.mark.parametrize("size", [32, 96])
def test_the_distance_grows_with_the_severity(kind: str, size: int) -> None:
    emoji = load_dataset("emoji:google", limit=20)
    images = load_batch(emoji, range(20), PixelTransform(size, "bicubic"), skip_bad=False)[0].images
    distance = [
        float((corrupt(kind, images, severity, streams(20)) - images).flatten(1).norm(dim=1).mean())
        for severity in range(1, 6)
    ]
    assert min(distance) > 0
    if kind not in UNORDERED:
        assert distance == sorted(distance)


@every_kind
def test_an_image_gets_the_same_in_any_company_and_another_with_another_seed(kind: str) -> None:
    images = pictures(5)
    together = corrupt(kind, images, 3, streams(5))
    assert torch.equal(together, corrupt(kind, images, 3, streams(5)))
    for i in range(5):
        alone = corrupt(kind, images[i : i + 1], 3, streams(5).select([i]))
        assert torch.allclose(alone[0], together[i], atol=1e-6)
    same = torch.equal(together, corrupt(kind, images, 3, streams(5, seed=1)))
    drawless = {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"}
    assert same == (kind in drawless)


@every_kind
def test_images_that_are_not_square_and_have_no_colour_are_no_trouble(kind: str) -> None:
    for image in (torch.zeros(1, 3, 20, 33), torch.ones(1, 3, 33, 20)):
        assert corrupt(kind, image, 5, streams(1)).isfinite().all()


def test_there_are_fifteen_with_five_severities_for_large_and_small_images() -> None:
    assert len(CORRUPTIONS) == 15
    for table in (LARGE_IMAGES, SMALL_IMAGES):
        assert table.keys() == CORRUPTIONS.keys()
        assert all(len(severities) == 5 for severities in table.values())


def test_images_of_up_to_64_pixels_get_the_parameters_of_small_ones() -> None:
    for shape, std in (((64, 64), 0.1), ((64, 200), 0.1), ((65, 65), 0.38)):
        grey = torch.full((1, 3, *shape), 0.5)
        noise = corrupt("gaussian_noise", grey, 5, streams(1)) - grey
        free = torch.randn(noise.shape, generator=torch.Generator().manual_seed(0)).mul(std).clamp(-0.5, 0.5)
        assert noise.std().item() == pytest.approx(free.std().item(), rel=0.03)


# noise


def test_gaussian_noise_has_the_published_spread() -> None:
    grey = torch.full((4, 3, 64, 64), 0.5)
    for severity, (std,) in enumerate(SMALL_IMAGES["gaussian_noise"], 1):
        noise = corrupt("gaussian_noise", grey, severity, streams(4)) - grey
        assert noise.std().item() == pytest.approx(std, rel=0.02)
        assert noise.mean().item() == pytest.approx(0, abs=3e-3)


def test_shot_noise_counts_photons() -> None:
    grey = torch.full((4, 3, 100, 100), 0.4)
    found = corrupt("shot_noise", grey, 1, streams(4))  # 60 photons at white
    counts = found * 60
    assert torch.allclose(counts, counts.round(), atol=1e-4)
    assert counts.mean().item() == pytest.approx(24, rel=0.01)
    assert counts.var().item() == pytest.approx(24, rel=0.03)
    assert torch.equal(corrupt("shot_noise", grey * 0, 5, streams(4)), grey * 0)


def test_impulse_noise_is_salt_and_pepper_on_the_published_share() -> None:
    grey = torch.full((4, 3, 64, 64), 0.5)
    found = corrupt("impulse_noise", grey, 5, streams(4))
    assert set(found.unique().tolist()) == {0.0, 0.5, 1.0}
    assert (found != 0.5).float().mean().item() == pytest.approx(0.07, abs=0.005)
    assert (found == 1).sum() / (found != 0.5).sum() == pytest.approx(0.5, abs=0.05)


# blur


def test_a_disk_sums_to_one_and_holds_the_pixels_within_its_radius() -> None:
    kernel = disk(3, 0.1)  # an alias of 0.1 leaves the disk as it is
    assert kernel.shape == (17, 17)
    assert (kernel > 1e-12).sum() == 29  # whole points within a radius of 3
    assert kernel[8, 11] == pytest.approx(1 / 29)
    assert float(disk(6, 0.5).sum()) == pytest.approx(1.0)
    assert disk(10, 0.5).shape == (21, 21)


def test_defocus_blur_spreads_a_point_into_its_disk() -> None:
    point = torch.zeros(1, 3, 65, 65)
    point[:, :, 32, 32] = 1
    assert torch.allclose(corrupt("defocus_blur", point, 1, streams(1))[0, 0, 24:41, 24:41], disk(3, 0.1).float())


@pytest.mark.parametrize(("border", "mode"), [("edge", "nearest"), ("mirror", "reflect"), ("reflect", "mirror")])
@pytest.mark.parametrize("sigma", [0.05, 0.7, 1.5, 40.0])
def test_a_gaussian_blur_is_scipy_s(border: str, mode: str, sigma: float) -> None:
    images = pictures(2, 21)
    expected = scipy.ndimage.gaussian_filter(images.double().numpy(), (0, 0, sigma, sigma), mode=mode, truncate=3.0)
    found = blurred(images, sigma, 3.0, border)  # type: ignore[arg-type]
    assert np.abs(found.numpy() - expected).max() < 1e-5


def test_borders_go_on_as_they_say() -> None:
    index = torch.arange(-4, 8)
    assert inside(index, 4, "edge").tolist() == [0, 0, 0, 0, 0, 1, 2, 3, 3, 3, 3, 3]
    assert inside(index, 4, "mirror").tolist() == [3, 2, 1, 0, 0, 1, 2, 3, 3, 2, 1, 0]
    assert inside(index, 4, "reflect").tolist() == [2, 3, 2, 1, 0, 1, 2, 3, 2, 1, 0, 1]
    assert inside(index, 1, "reflect").tolist() == [0] * 12


@pytest.mark.parametrize(("reach", "size"), [(1, 7), (2, 12), (4, 12), (4, 8)])
def test_glass_moves_pixels_as_the_loop_over_them_does(reach: int, size: int) -> None:
    """From the last pixel to the first, each takes the value that another one has at that time."""
    generator = torch.Generator().manual_seed(reach)
    down, right = torch.randint(-reach, reach, (2, 3, size, size), generator=generator)
    found = sources(down, right, reach)
    for image in range(3):
        values = np.arange(size * size).reshape(size, size)
        for row in range(size - reach, reach, -1):
            for column in range(size - reach, reach, -1):
                other = row + int(down[image, row, column]), column + int(right[image, row, column])
                values[row, column] = values[other]
        assert found[image].tolist() == values.flatten().tolist()


def test_motion_blur_trails_to_one_side() -> None:
    point = torch.zeros(2, 1, 9, 9)
    point[:, :, 4, 4] = 1.0
    found = motion_blurred(point, 2, 1.0, torch.tensor([0.0, -90.0]))
    weights = torch.exp(-0.5 * torch.arange(5.0) ** 2)
    weights /= weights.sum()
    # a pixel looks along the direction, so the trail lies on the other side: to the left, and below
    assert torch.allclose(found[0, 0, 4], torch.cat([weights.flip(0), torch.zeros(4)]))
    assert torch.allclose(found[1, 0, :, 4], torch.cat([torch.zeros(4), weights]))
    assert found.sum().item() == pytest.approx(2)


def test_a_zoom_by_two_enlarges_the_centre_as_scipy_does() -> None:
    image = pictures(1, 8)
    assert torch.equal(zoomed(image, 1.0), image)
    expected = scipy.ndimage.zoom(image[0, 0, 2:6, 2:6].numpy(), 2.0, order=1)
    assert np.abs(zoomed(image, 2.0)[0, 0].numpy() - expected).max() < 1e-6
    ramp = torch.linspace(0, 1, 8).expand(1, 3, 8, 8)
    assert zoomed(ramp, 1.3).diff(dim=3).mean() < ramp.diff(dim=3).mean()


# weather


def test_fractal_noise_spans_0_to_1_and_is_smoother_the_faster_it_decays() -> None:
    rough, smooth = (plasma(streams(4), 30, 50, decay) for decay in (1.2, 3.0))
    assert rough.shape == (4, 1, 30, 50)
    full = plasma(streams(4), 64, 64, 2.0)
    assert full.flatten(1).amin(1).tolist() == [0.0] * 4
    assert full.flatten(1).amax(1).tolist() == [1.0] * 4
    assert rough.diff(dim=3).abs().mean() > 2 * smooth.diff(dim=3).abs().mean()


def test_fog_adds_clouds_and_keeps_the_brightest_value() -> None:
    images = pictures(2) * 0.8
    clouds = plasma(streams(2), 32, 32, 2.0)
    highest = images.flatten(1).amax(1).view(2, 1, 1, 1)
    assert torch.allclose(fog(images, streams(2), 1.5, 2.0), (images + 1.5 * clouds) * highest / (highest + 1.5))
    assert (fog(images, streams(2), 1.5, 2.0) <= highest + 1e-6).all()


def test_snow_and_frost_brighten_a_dark_picture() -> None:
    dark = torch.full((6, 3, 96, 96), 0.1)
    for kind in ("snow", "frost"):
        found = corrupt(kind, dark, 3, streams(6))
        assert (found.mean(dim=(1, 2, 3)) > 0.15).all()
        assert (found.std(dim=(1, 2, 3)) > 0.03).all()
        assert not torch.allclose(found[0], found[1], atol=0.05)


# digital


def test_brightness_raises_the_value_and_keeps_the_hue() -> None:
    pixels = torch.tensor([[0.5, 0.25, 0.0], [0.9, 0.9, 0.3], [0.0, 0.0, 0.0]]).T.view(1, 3, 1, 3)
    found = brightness(pixels, streams(1), 0.2)[0, :, 0].T
    assert torch.allclose(found[0], torch.tensor([0.7, 0.35, 0.0]))  # value 0.5 -> 0.7
    assert torch.allclose(found[1], torch.tensor([1.0, 1.0, 1 / 3]))  # value 0.9 -> 1, not beyond
    assert torch.allclose(found[2], torch.tensor([0.2, 0.2, 0.2]))  # black has no hue


def test_contrast_shrinks_towards_the_mean_of_each_channel() -> None:
    pixels = torch.tensor([[0.0, 1.0], [0.2, 0.4]]).view(1, 2, 1, 2)
    assert torch.allclose(contrast(pixels, streams(1), 0.4).flatten(), torch.tensor([0.3, 0.7, 0.26, 0.34]))


@pytest.mark.parametrize(("source", "target"), [(32, 19), (32, 8), (8, 32), (19, 32), (7, 7), (5, 1)])
def test_boxes_are_pil_s(source: int, target: int) -> None:
    values = np.random.default_rng(0).random((1, source), dtype=np.float32)
    expected = np.asarray(Image.fromarray(values).resize((target, 1), Image.Resampling.BOX))
    assert np.abs(box_matrix(source, target).numpy() @ values[0] - expected[0]).max() < 1e-6


def test_pixelate_leaves_squares_of_one_value() -> None:
    images = pictures(2, 96)
    found = corrupt("pixelate", images, 5, streams(2))  # 0.25: squares of 4 pixels
    assert torch.allclose(
        found,
        images.unfold(2, 4, 4).unfold(3, 4, 4).mean((4, 5)).repeat_interleave(4, 2).repeat_interleave(4, 3),
        atol=1e-6,
    )


def test_jpeg_compression_is_pil_s() -> None:
    images = pictures(2, 96)
    found = corrupt("jpeg_compression", images, 2, streams(2))
    file = io.BytesIO()
    Image.fromarray((images[1] * 255).round().byte().permute(1, 2, 0).numpy()).save(file, "JPEG", quality=18)
    assert torch.equal((found[1] * 255).round().byte().permute(1, 2, 0), torch.from_numpy(np.array(Image.open(file))))


def test_an_elastic_transform_that_moves_no_point_bends_only_a_little() -> None:
    """Severity 1 of small images has no field: an affine map, so straight lines stay straight."""
    ramp = torch.linspace(0.2, 0.8, 32).expand(4, 3, 32, 32)
    found = corrupt("elastic_transform", ramp, 1, streams(4))
    middle = found[:, :, 10:22, 10:22]
    assert middle.diff(dim=3).diff(dim=3).abs().max() < 1e-4
    assert middle.diff(dim=2).diff(dim=2).abs().max() < 1e-4
    assert (found - ramp).abs().max() > 0.02


# the attack


def test_random_gives_each_image_one_kind_of_its_own_stream_the_same_at_every_severity() -> None:
    images = pictures(1).expand(60, -1, -1, -1).contiguous()
    ids = [f"image-{i}" for i in range(60)]
    drawn: list[list[str]] = []
    for severity in (2.0, 5.0):
        found = perturbed(images, severity, ids=ids)
        by_name = {kind: perturbed(images, severity, kind, ids) for kind in KINDS}
        drawn.append([next(k for k in KINDS if torch.allclose(by_name[k][i], found[i], atol=1e-6)) for i in range(60)])
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) >= 12


def test_the_mean_over_random_kinds_estimates_the_mean_over_all() -> None:
    images = pictures(1).expand(300, -1, -1, -1).contiguous()

    def distance(found: Tensor) -> Tensor:
        return (found - images).flatten(1).norm(dim=1)

    ids = [f"image-{i}" for i in range(300)]
    every = torch.stack([distance(perturbed(images, 3.0, kind, ids)) for kind in KINDS])
    estimate = distance(perturbed(images, 3.0, ids=ids))
    error = float(every.std() / 300**0.5)
    assert float(estimate.mean()) == pytest.approx(float(every.mean()), abs=3 * error)


def test_severities_may_differ_between_images() -> None:
    images = pictures(4)
    mixed = perturbed(images, torch.tensor([0.0, 1.0, 3.0, 5.0]))
    assert torch.equal(mixed[0], images[0])
    for i, severity in enumerate((1.0, 3.0, 5.0), 1):
        assert torch.equal(mixed[i], perturbed(images, severity)[i])


def test_worst_is_the_kind_of_highest_margin_for_each_image() -> None:
    model = convolutional()
    images, labels, ids = labelled(model, (3, 8, 8), 6)
    threat = Threat("corruption", 4.0)

    def margin(kind: str) -> Tensor:
        view = View(model, ImageRng(0, ids), stop=False)
        return Corruption(kind=kind)(view, images, labels, threat).margin  # type: ignore[arg-type]

    every = torch.stack([margin(kind) for kind in KINDS])
    assert torch.allclose(margin("worst"), every.amax(dim=0), atol=1e-5)
    assert (every.argmax(dim=0) != every.argmax(dim=0)[0]).any()


def test_only_worst_asks_the_view() -> None:
    def refuses(images: Tensor, rng: ImageRng) -> Outputs:
        raise AssertionError("the view was asked")

    model: Any = refuses
    model.num_classes, model.stochastic = 5, False
    images, rng = pictures(3), streams(3)
    view = View(model, rng)
    threat, labels = Threat("corruption", 2.0), torch.zeros(3, dtype=torch.int64)
    for kind in ("random", "fog", "worst"):
        attack = Corruption(kind=kind)  # type: ignore[arg-type]
        run: Callable[[], Tensor] = lambda attack=attack: attack.perturb(view, images, labels, threat, rng)  # noqa: E731
        if attack.blind:
            run()
        else:
            with pytest.raises(AssertionError, match="was asked"):
                run()
    assert [Corruption(kind=k).blind for k in ("random", "fog", "worst")] == [True, True, False]  # type: ignore[arg-type]
    assert [Corruption(kind=k).budget(2) for k in ("random", "worst")] == [(0, 0), (30, 0)]  # type: ignore[arg-type]


@pytest.mark.parametrize("severity", [2.5, 6.0, -1.0])
def test_a_severity_that_is_none_is_refused(severity: float) -> None:
    with pytest.raises(UserError, match="whole number from 0"):
        perturbed(pictures(2), severity)


def test_grey_images_are_refused() -> None:
    with pytest.raises(UserError, match=r"needs images \(B, 3, H, W\)"):
        perturbed(pictures(2)[:, :1], 2.0)
