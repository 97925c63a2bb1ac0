"""The shipped input transforms do what they say, by hand-computed values."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

import vlmdefend
from vlmdefend.attacks.bpda import bpda
from vlmdefend.attacks.gradient.pgd import Pgd
from vlmdefend.attacks.view import View
from vlmdefend.data.loader import load_batch
from vlmdefend.data.transforms import PixelTransform
from vlmdefend.defenses.base import TransformedInput
from vlmdefend.defenses.training_free import _jpeg_surrogate
from vlmdefend.defenses.training_free._jpeg_surrogate import jpeg_surrogate
from vlmdefend.defenses.training_free.jpeg import Jpeg
from vlmdefend.defenses.training_free.low_pass import LowPass
from vlmdefend.defenses.training_free.noise import Noise
from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng
from vlmdefend.types import Batch, Threat


@pytest.fixture(scope="module")
def photos() -> torch.Tensor:
    return load_batch(vlmdefend.load_dataset("emoji:google", limit=40), range(40), PixelTransform(32), skip_bad=False)[
        0
    ].images


def test_jpeg_is_the_codec_of_an_8_bit_image(photos: torch.Tensor) -> None:
    compressed = Jpeg(quality=60).compress(photos[:1])
    levels = (photos[0] * 255).round().byte().permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "JPEG", quality=60)
    by_pillow = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1).float() / 255
    assert (compressed[0] - by_pillow).abs().mean() < 0.004  # two builds of libjpeg may differ in the DCT's last bit


@pytest.mark.parametrize("quality", [30, 50, 75, 95])
def test_the_surrogate_is_much_closer_to_the_codec_than_the_identity(photos: torch.Tensor, quality: int) -> None:
    """At quality 95 what is left is the codec's own rounding to 8 bits between its stages, about one level."""
    exact = Jpeg(quality=quality).compress(photos)
    surrogate = (jpeg_surrogate(photos, quality) - exact).abs().mean()
    identity = (photos - exact).abs().mean()
    assert surrogate < identity / 2


def robust_under(transform, classifier, batch: Batch, eps: float, steps: int) -> int:  # type: ignore[no-untyped-def]
    pipeline = TransformedInput(classifier, lambda images, rng: transform(images))
    view = View(pipeline, ImageRng(0, batch.ids))
    return int((~Pgd(steps=steps)(view, batch.images, batch.labels, Threat("linf", eps)).fooled).sum())


@pytest.mark.parametrize(("name", "eps"), [("tiny-vit", 16 / 255), ("tiny-rn", 6 / 255)])
def test_no_simpler_surrogate_breaks_more(name: str, eps: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Identity, rounding passed straight through, and the cubic gradient without its floor leave more images right."""
    model = vlmdefend.load_model(name)
    images = vlmdefend.load_dataset("fashion", limit=100)
    batch = load_batch(images, range(100), PixelTransform(model.image_size), skip_bad=False)[0]
    classifier = model.zero_shot(images.class_names, ["a photo of a {c}."])
    jpeg = Jpeg(quality=50)

    def left(surrogate) -> int:  # type: ignore[no-untyped-def]
        return robust_under(bpda(jpeg.compress, surrogate), classifier, batch, eps, 10)

    ours = left(lambda x: jpeg_surrogate(x, 50))
    others = {"identity": left(None)}
    monkeypatch.setattr(_jpeg_surrogate, "FLOOR", 0.0)
    others["cubic"] = left(lambda x: jpeg_surrogate(x, 50))
    monkeypatch.setattr(_jpeg_surrogate._Round, "backward", staticmethod(lambda ctx, *gradients: gradients[0]))
    others["straight through"] = left(lambda x: jpeg_surrogate(x, 50))
    assert ours <= min(others.values()), (ours, others)
    assert ours < others["identity"]


def test_the_surrogate_takes_any_size() -> None:
    for height, width in ((1, 1), (7, 33), (16, 16), (30, 17)):
        image = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))
        assert jpeg_surrogate(image, 75).shape == image.shape
        assert Jpeg().compress(image).shape == image.shape


def test_low_pass_keeps_the_mean_and_weighs_each_frequency_by_the_gaussian() -> None:
    size, radius = 32, 0.25
    x = torch.arange(size) / size
    for cycles in (1, 4, 8):
        wave = (0.5 + 0.4 * torch.cos(2 * torch.pi * cycles * x)).expand(1, 3, size, size)
        weight = float(torch.exp(torch.tensor(-0.5 * (cycles / (radius * size)) ** 2)))
        expected = (0.5 + weight * 0.4 * torch.cos(2 * torch.pi * cycles * x)).expand(1, 3, size, size)
        assert torch.allclose(LowPass(radius=radius).filter(wave), expected, atol=1e-5)


def test_noise_has_its_standard_deviation_and_is_drawn_anew_at_every_call() -> None:
    images, rng = torch.full((4, 3, 64, 64), 0.5), ImageRng(0, list("abcd"))
    first, second = Noise(sigma=0.1).add_noise(images, rng), Noise(sigma=0.1).add_noise(images, rng)
    assert (first - images).std().item() == pytest.approx(0.1, rel=0.02)
    assert (first - images).mean().abs() < 0.003
    assert not torch.equal(first, second)


@pytest.mark.parametrize("make", [lambda: Jpeg(quality=0), lambda: Noise(sigma=-1.0), lambda: LowPass(radius=0.0)])
def test_impossible_settings_are_refused(make) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError):
        make()
