from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlmdefend.data.base import BadImage
from vlmdefend.data.images import decode

Encode = Callable[..., bytes]


def encoded(image: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, file_format, **options)
    return stream.getvalue()


def palette_with_transparency() -> Image.Image:
    image = Image.new("RGB", (4, 4), (200, 10, 30)).quantize(4)
    image.info["transparency"] = bytes([0, 128, 255, 255])
    return image


@pytest.mark.parametrize(
    ("image", "file_format", "expected"),
    [
        (Image.new("L", (3, 2), 77), "PNG", (77, 77, 77)),
        (Image.new("1", (3, 2), 1), "PNG", (255, 255, 255)),
        (Image.new("LA", (3, 2), (77, 0)), "PNG", (77, 77, 77)),
        (Image.new("RGBA", (3, 2), (10, 20, 30, 0)), "PNG", (10, 20, 30)),
        (Image.new("RGB", (3, 2), (200, 10, 30)).quantize(4), "PNG", (200, 10, 30)),
        (palette_with_transparency(), "PNG", (200, 10, 30)),
        (Image.new("CMYK", (3, 2), (0, 255, 255, 0)), "TIFF", (255, 0, 0)),
        (Image.new("RGB", (1, 1), (1, 2, 3)), "PNG", (1, 2, 3)),
    ],
    ids=["grey", "bilevel", "grey+alpha", "rgba", "palette", "palette+alpha", "cmyk", "1x1"],
)
def test_every_common_mode_becomes_rgb_as_convert_gives_it(
    image: Image.Image, file_format: str, expected: tuple[int, int, int]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = decode(encoded(image, file_format), "x")
    assert picture.mode == "RGB"
    assert picture.size == image.size
    assert picture.getpixel((0, 0)) == expected


def test_a_cmyk_jpeg_is_converted() -> None:
    red = decode(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), "x").getpixel((4, 4))
    assert isinstance(red, tuple)
    assert red[0] > 240
    assert max(red[1:]) < 15


@pytest.mark.parametrize(("file_format"), ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey_is_scaled_and_not_clipped(file_format: str) -> None:
    levels = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    picture = decode(encoded(Image.fromarray(levels), file_format), "x")
    assert np.asarray(picture)[0, :, 0].tolist() == [0, 0, 1, 128, 255]


def test_thirty_two_bit_pixels_are_refused_because_their_range_is_unknown() -> None:
    with pytest.raises(BadImage, match=r"^depth.tiff: .*32-bit"):
        decode(encoded(Image.fromarray(np.ones((2, 2), dtype=np.float32)), "TIFF"), "depth.tiff")


def rotated() -> tuple[bytes, Image.Image]:
    image = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(2, 4, 3) * 10)
    exif = Image.Exif()
    exif[0x0112] = 6  # show it turned by a quarter
    return encoded(image, "PNG", exif=exif), image


def test_an_exif_rotated_picture_is_shown_upright() -> None:
    content, image = rotated()
    assert np.array_equal(np.asarray(decode(content, "x")), np.asarray(image.transpose(Image.Transpose.ROTATE_270)))


def test_upright_false_reads_pixels_as_torchvision_does() -> None:
    content, image = rotated()
    assert np.array_equal(np.asarray(decode(content, "x", upright=False)), np.asarray(image))


def test_a_broken_exif_block_does_not_lose_the_picture() -> None:
    content = encoded(Image.new("RGB", (4, 4), (9, 9, 9)), "PNG", exif=b"Exif\0\0nonsense")
    assert decode(content, "x").getpixel((0, 0)) == (9, 9, 9)


@pytest.mark.parametrize("kind", ["empty", "text", "truncated png", "truncated jpeg", "header only", "damaged"])
def test_a_bad_file_is_refused_by_its_name(kind: str, encode: Encode, tmp_path: Path) -> None:
    png, jpeg = encode(size=(40, 40)), encode(size=(40, 40), file_format="JPEG")
    content = {
        "empty": b"",
        "text": b"not a picture",
        "truncated png": png[: len(png) // 2],
        "truncated jpeg": jpeg[: len(jpeg) // 2],
        "header only": png[:20],
        "damaged": png[:60] + bytes(40) + png[100:],
    }[kind]
    file = tmp_path / "cat.png"
    file.write_bytes(content)
    for source in (file, content):
        with pytest.raises(BadImage, match=r"^cat\.png: .*--skip-bad"):
            decode(source, "cat.png")


def test_a_missing_file_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(BadImage, match=r"^gone\.png: cannot be read \(No such file"):
        decode(tmp_path / "gone.png", "gone.png")


def test_a_decompression_bomb_is_refused(monkeypatch: pytest.MonkeyPatch, encode: Encode) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(BadImage, match=r"^bomb.png: .*DecompressionBomb"):
        decode(encode(), "bomb.png")
