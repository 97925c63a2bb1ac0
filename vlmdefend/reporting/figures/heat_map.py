"""Draws a heat map of a matrix of shares: one hue, dark is high, the number in every cell."""

from __future__ import annotations

import io
from collections.abc import Sequence

from vlmdefend.reporting.figures.contact_sheet import legible

CELL, HEAD, MARGIN, SIZE = (132, 64), 44, 28, 15
INK, FAINT, PAPER, LOW, HIGH = "#1d1d1f", "#6e6e73", "#ffffff", (238, 243, 250), (11, 61, 120)


def heat_map(
    title: str, about: str, rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[tuple[float, str]]]
) -> bytes:
    """Draws a matrix of shares as a PNG file.

    Args:
        title: first line; about: second line, smaller.
        rows: names at the left; columns: names at the top.
        values: by row and column: a share in [0, 1], and a small text below its number.
    """
    from PIL import Image, ImageDraw, ImageFont

    font, small = ImageFont.load_default(SIZE), ImageFont.load_default(SIZE - 3)
    probe = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    side = MARGIN + 12 + max(int(probe.textlength(legible(name), font)) for name in rows)
    wide = max(CELL[0], *(int(probe.textlength(legible(name), font)) + 16 for name in columns))
    top = 2 * MARGIN + 2 * HEAD
    text_width = max(int(probe.textlength(legible(line), font)) for line in (title, about))
    width = max(side + wide * len(columns), MARGIN + text_width) + MARGIN
    picture = Image.new("RGB", (width, top + CELL[1] * len(rows) + MARGIN), PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((MARGIN, MARGIN), legible(title), fill=INK, font=font)
    draw.text((MARGIN, MARGIN + SIZE + 9), legible(about), fill=FAINT, font=small)
    for j, name in enumerate(columns):
        centre = side + j * wide + wide // 2
        draw.text((centre, top - 10), legible(name), fill=INK, font=font, anchor="ms")
    for i, name in enumerate(rows):
        y = top + i * CELL[1]
        draw.text((side - 12, y + CELL[1] // 2), legible(name), fill=INK, font=font, anchor="rm")
        for j, (share, note) in enumerate(values[i]):
            x = side + j * wide
            color = tuple(round(low + share * (high - low)) for low, high in zip(LOW, HIGH, strict=True))
            ink = PAPER if share > 0.45 else INK
            draw.rectangle((x, y, x + wide - 2, y + CELL[1] - 2), fill=color)
            draw.text((x + wide // 2, y + 26), f"{100 * share:.1f}", fill=ink, font=font, anchor="mm")
            draw.text((x + wide // 2, y + 46), legible(note), fill=ink, font=small, anchor="mm")
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
