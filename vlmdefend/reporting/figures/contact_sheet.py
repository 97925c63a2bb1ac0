"""Draws a contact sheet of a saved set: clean and adversarial images, their differences and the predictions.

Drawn with Pillow and its own font, which has the letters of English: accents are dropped, any other character is
written as its escape. Differences are shown around grey, so grey means unchanged. All differences of a sheet are
multiplied by one gain, at which 99 % of them stay inside the range from black to white.
"""

from __future__ import annotations

import io
import unicodedata
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

import numpy as np

from vlmdefend.data.loader import load_batch
from vlmdefend.evaluation.store.records import ImageRow
from vlmdefend.types import ABSTAINED, format_eps

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image, ImageDraw, ImageFont

    from vlmdefend.evaluation.adversarial_sets.crafting import CraftedSet
    from vlmdefend.evaluation.adversarial_sets.set_format import IndexRow

    Pixels = NDArray[np.float32]  # (H, W, 3) in [0, 1]

FOOLED, SURVIVED = 8, 4  # the most images of each kind on a sheet
TILE, GAP, MARGIN, COLUMNS = 160, 10, 28, 2
SIZE, LINE = 14, 19
INK, FAINT, RED, GREEN, PAPER = "#1d1d1f", "#6e6e73", "#c0271b", "#1b7f3b", "#ffffff"


@dataclass(frozen=True)
class ContactSheetItem:
    """One image of the sheet, with its predictions and margin."""

    row: ImageRow
    clean: Pixels
    adversarial: Pixels


def contact_sheet(crafted: CraftedSet) -> bytes | None:
    """Returns the sheet of a set as a PNG file; None where no image was attacked."""
    saved = crafted.saved
    chosen = choose(saved.rows)
    shown = []
    for row in chosen:
        clean = load_batch(crafted.images, [row.number], crafted.transform, skip_bad=False)[0].images
        pairs = [images[0].permute(1, 2, 0).numpy() for images in (clean, saved.images([row]))]
        shown.append(ContactSheetItem(row, *pairs))
    if not shown:
        return None
    cell, n = saved.manifest.cell, saved.manifest.n
    norm = {"linf": "L_inf", "l2": "L2"}.get(cell.norm, cell.norm)
    title = f"{saved.manifest.source} on {cell.dataset} ({cell.split}), {norm} {format_eps(cell.eps)}"
    robust = saved.manifest.clean_correct - saved.manifest.fooled
    about = f"{n} images: {saved.manifest.clean_correct} right when clean, {robust} still right when attacked"
    buffer = io.BytesIO()
    draw_sheet(shown, saved.manifest.class_names, title, about).save(buffer, "PNG")
    return buffer.getvalue()


def choose(rows: Sequence[IndexRow]) -> list[IndexRow]:
    """Returns the fooled images of largest margin, then the survivors of smallest margin."""
    attacked = sorted((row for row in rows if row.clean_correct), key=lambda row: (-row.adversarial_margin, row.id))
    fooled = [row for row in attacked if not row.robust]
    survived = [row for row in attacked if row.robust]
    free = max(0, FOOLED - len(fooled))
    chosen = survived[: SURVIVED + free]
    return [*fooled[: FOOLED + SURVIVED - len(chosen)], *chosen]


def draw_sheet(shown: Sequence[ContactSheetItem], class_names: Sequence[str], title: str, about: str) -> Image.Image:
    """Draws one card per image, in two columns under a heading; all differences have the same gain."""
    from PIL import Image, ImageDraw

    gain = _gain(np.concatenate([np.abs(one.adversarial - one.clean).ravel() for one in shown]))
    card = (3 * TILE + 2 * GAP, TILE + 4 * LINE + 8)
    lines = -(-len(shown) // COLUMNS)
    head = 3 * LINE + 2 * GAP
    columns = min(COLUMNS, len(shown))
    width = 2 * MARGIN + columns * card[0] + (columns - 1) * MARGIN
    sheet = Image.new("RGB", (width, MARGIN + head + lines * (card[1] + MARGIN)), PAPER)
    draw = ImageDraw.Draw(sheet)
    whole = width - 2 * MARGIN
    _write(draw, (MARGIN, MARGIN), title, whole, INK, SIZE + 4)
    _write(draw, (MARGIN, MARGIN + LINE + 6), about, whole, INK)
    legend = f"difference: x {gain:g} around grey; margin: best other logit minus the label's, above 0 = fooled"
    _write(draw, (MARGIN, MARGIN + 2 * LINE + 6), legend, whole, FAINT)
    for i, one in enumerate(shown):
        x = MARGIN + (i % COLUMNS) * (card[0] + MARGIN)
        y = MARGIN + head + (i // COLUMNS) * (card[1] + MARGIN)
        _draw_card(sheet, draw, (x, y), one, class_names, gain)
    return sheet


def legible(text: str) -> str:
    """Replaces letters that the font lacks by their escape, ``\\n``, ``\\u30b7``; drops accents."""
    return "".join(_written(character) for character in text)


def _written(character: str) -> str:
    """Returns the character as printable ASCII: without accent, or as its escape."""
    plain = unicodedata.normalize("NFKD", character)
    plain = "".join(c for c in plain if not unicodedata.combining(c))
    if plain.isascii() and plain.isprintable():
        return plain
    return character.encode("unicode_escape").decode()


def _draw_card(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    at: tuple[int, int],
    one: ContactSheetItem,
    class_names: Sequence[str],
    gain: float,
) -> None:
    """Draws one image of the sheet: three tiles (clean, adversarial, difference) with their texts."""
    x, y = at
    row = one.row
    width = 3 * TILE + 2 * GAP
    word, color = ("survived", GREEN) if row.robust else ("FOOLED", RED)
    _write(draw, (x, y), word, 80, color)
    _write(draw, (x + 80, y), f"{row.id}", width - 80, FAINT)
    difference = np.clip(0.5 + gain * (one.adversarial - one.clean), 0, 1)
    tiles = (
        ("clean", one.clean, _name(class_names, row.clean_prediction), f"margin {row.clean_margin:+.2f}", INK),
        ("adversarial", one.adversarial, _name(class_names, row.adversarial_prediction), "", color),
        (f"difference x {gain:g}", difference, f"distance {row.distance:.4g}", f"{row.steps} steps", FAINT),
    )
    for i, (header, pixels, first, second, ink) in enumerate(tiles):
        left = x + i * (TILE + GAP)
        _write(draw, (left, y + LINE), header, TILE, FAINT)
        sheet.paste(_tile(pixels), (left, y + 2 * LINE))
        below = y + 2 * LINE + TILE + 4
        _write(draw, (left, below), first, TILE, ink)
        _write(draw, (left, below + LINE), second or f"margin {row.adversarial_margin:+.2f}", TILE, FAINT)


def _name(class_names: Sequence[str], prediction: int) -> str:
    return "no answer" if prediction == ABSTAINED else class_names[prediction]


def _tile(pixels: Pixels) -> Image.Image:
    """Returns a square of TILE pixels: small images enlarged in whole pixels, large ones averaged."""
    from PIL import Image

    picture = Image.fromarray((pixels * 255).round().astype(np.uint8))
    scale = TILE / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    fitted = picture.resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BOX)
    tile = Image.new("RGB", (TILE, TILE), "#e8e8ed")
    tile.paste(fitted, ((TILE - size[0]) // 2, (TILE - size[1]) // 2))
    return tile


def _gain(differences: NDArray[np.float32]) -> float:
    """Returns the magnification of the differences, rounded down to a readable number."""
    largest = float(np.quantile(differences, 0.99)) or float(differences.max())
    if largest <= 0:
        return 1.0
    gain = 0.5 / largest + 1e-3  # so that 4.9999 becomes 5
    return float(int(gain)) if gain >= 1 else int(gain * 10) / 10


def _write(draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, width: int, color: str, size: int = SIZE) -> None:
    """Draws one line of text, cut to ``width`` pixels with an ellipsis."""
    font = _font(size)
    line = legible(text[:width])  # every letter is at least a pixel wide
    if draw.textlength(line, font) > width:
        fits = bisect_right(range(len(line)), width, key=lambda n: ceil(draw.textlength(f"{line[:n]}...", font))) - 1
        line = f"{line[: max(0, fits)]}..."
    draw.text(at, line, fill=color, font=font)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    from PIL import ImageFont

    return ImageFont.load_default(size)
