"""Decodes one file or byte string to an RGB picture; errors name the file."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from vlmdefend.data.base import BadImage

if TYPE_CHECKING:
    from PIL import Image


def decode(source: bytes | Path, label_for_errors: str, *, upright: bool = True) -> Image.Image:
    """Decodes a picture to 8-bit RGB, at its own size.

    Args:
        source: the encoded bytes, or the file that holds them.
        label_for_errors: the file name or id an error message starts with.
        upright: turn the picture by its EXIF orientation (what a viewer shows). torchvision's loaders do
            not, so its sets are read with False.

    Raises:
        BadImage: not an image, empty, truncated, corrupt, unreadable, or a decompression bomb.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        encoded = source if isinstance(source, bytes) else source.read_bytes()
        if encoded:
            with Image.open(io.BytesIO(encoded)) as image:
                image.load()
                return to_rgb(_upright(image) if upright else image, image.format)
        reason = "the file is empty"
    except UnidentifiedImageError:
        reason = "not an image that Pillow can read"
    except OSError as error:
        reason = f"cannot be read ({error.strerror or error})"
    except Exception as error:  # decoders fail in as many ways as files can be broken
        reason = f"cannot be decoded ({type(error).__name__}: {error})"
    raise BadImage(f"{label_for_errors}: {reason}; replace the file, or leave it out with --skip-bad.")


def to_rgb(image: Image.Image, file_format: str | None = None) -> Image.Image:
    """Converts a picture to 8-bit RGB as ``Image.convert("RGB")`` does, with 16-bit grey scaled and not clipped.

    Transparency is dropped, not composited, as torchvision and open_clip do. 16-bit grey keeps its high byte,
    which is what Pillow does to 16-bit colour.

    Raises:
        ValueError: 32-bit pixels, whose range no file states.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and file_format in ("PNG", "PPM")):
        image = _high_byte(image)
    if image.mode in ("I", "F"):
        raise ValueError("32-bit pixels have no stated range, save it with 8 or 16 bits")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours; prints nothing, unlike P to RGB
    return image.convert("RGB")


def _high_byte(image: Image.Image) -> Image.Image:
    import numpy as np
    from PIL import Image

    return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))


def _upright(image: Image.Image) -> Image.Image:
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a viewer shows a picture whose EXIF block is broken, unturned
        return image
