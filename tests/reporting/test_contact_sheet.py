"""The picture of a set: whom it shows, and that it can be read whatever the names hold."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from vlmdefend.evaluation.adversarial_sets.set_format import IndexRow
from vlmdefend.reporting.figures.contact_sheet import (
    GAP,
    LINE,
    MARGIN,
    TILE,
    ContactSheetItem,
    choose,
    draw_sheet,
    legible,
)

NAMES = ("cat", "dog")


def row(number: int, margin: float, *, clean: bool = True, name: str = "") -> IndexRow:
    return IndexRow(
        id=name or f"i{number}",
        label=0,
        clean_prediction=0 if clean else 1,
        clean_margin=-1.0 if clean else 1.0,
        adversarial_prediction=int(margin > 0),
        adversarial_margin=margin,
        distance=0.01,
        steps=3,
        number=number,
        file="images-00000.safetensors",
        position=number,
        fooled=clean and margin > 0,
        clean_hash="0",
    )


def shown(row: IndexRow, change: float = 4 / 255, size: tuple[int, int] = (8, 8)) -> ContactSheetItem:
    clean = np.full((*size, 3), 0.5, dtype=np.float32)
    adversarial = clean.copy()
    adversarial[: size[0] // 2] += np.float32(change)
    return ContactSheetItem(row, clean, adversarial)


def pixels(sheet: Image.Image) -> np.ndarray:
    return np.asarray(sheet).astype(int)


def tile(sheet: Image.Image, column: int) -> np.ndarray:
    """The picture in a column of the first card."""
    left, top = MARGIN + column * (TILE + GAP), MARGIN + 3 * LINE + 2 * GAP + 2 * LINE
    return pixels(sheet)[top : top + TILE, left : left + TILE]


# whom it shows


def test_misclassified_images_come_first_then_the_smallest_margins_without_images_not_attacked() -> None:
    margins = [0.5, 2.0, -0.1, -3.0, 1.0]
    rows = [*(row(i, margin) for i, margin in enumerate(margins)), row(9, 5.0, clean=False)]
    assert [one.number for one in choose(rows)] == [1, 4, 0, 2, 3]


@pytest.mark.parametrize(("fooled", "survived", "expected"), [(50, 50, (8, 4)), (50, 0, (12, 0)), (1, 50, (1, 11))])
def test_a_dozen_images_are_shown_whatever_the_attack_achieved(
    fooled: int, survived: int, expected: tuple[int, int]
) -> None:
    rows = [row(i, 1.0) for i in range(fooled)] + [row(100 + i, -1.0) for i in range(survived)]
    chosen = choose(rows)
    assert (sum(one.fooled for one in chosen), sum(not one.fooled for one in chosen)) == expected


# what it shows


def test_the_tiles_are_the_clean_image_the_adversarial_one_and_the_difference_around_grey() -> None:
    sheet = draw_sheet([shown(row(0, 1.0), change=0.1)], NAMES, "title", "about")
    assert (tile(sheet, 0) == 128).all()
    assert (tile(sheet, 1)[: TILE // 2] == 153).all()  # 0.6 * 255
    assert (tile(sheet, 1)[TILE // 2 :] == 128).all()
    assert (tile(sheet, 2)[: TILE // 2] == 255).all()
    assert (tile(sheet, 2)[TILE // 2 :] == 128).all()


def test_all_cards_share_the_gain_of_the_largest_difference() -> None:
    small, large = shown(row(0, 1.0), change=0.05), shown(row(1, 1.0), change=0.1)
    alone, together = draw_sheet([small], NAMES, "t", "a"), draw_sheet([small, large], NAMES, "t", "a")
    assert tile(alone, 2)[0, 0, 0] > tile(together, 2)[0, 0, 0] > 128


def test_a_few_large_differences_do_not_leave_the_others_grey() -> None:
    one = shown(row(0, 1.0), change=0.02, size=(20, 20))
    one.adversarial[0, 0] = 1.0
    assert tile(draw_sheet([one], NAMES, "t", "a"), 2)[TILE // 4, TILE // 2, 0] == 255


def test_an_abstention_is_shown_as_no_class() -> None:
    silent = shown(row(0, 1.0).model_copy(update={"adversarial_prediction": -1}))
    last = shown(row(0, 1.0).model_copy(update={"adversarial_prediction": 1}))
    sheets = [pixels(draw_sheet([one], NAMES, "t", "a")) for one in (silent, last)]
    assert (sheets[0] != sheets[1]).any()


def test_an_image_that_did_not_change_is_grey_and_divides_by_nothing() -> None:
    sheet = draw_sheet([shown(row(0, -1.0), change=0.0)], NAMES, "t", "a")
    assert (tile(sheet, 2) == 128).all()


@pytest.mark.parametrize("size", [(8, 8), (300, 300), (40, 160), (1, 1)])
def test_a_picture_of_any_size_has_a_tile_of_the_same_size(size: tuple[int, int]) -> None:
    whole = draw_sheet([shown(row(0, 1.0), size=size)], NAMES, "t", "a")
    assert whole.size == draw_sheet([shown(row(0, 1.0))], NAMES, "t", "a").size


# names


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("na\u00efve caf\u00e9", "naive cafe"),
        ("\u00df", "\\xdf"),
        ("\u30b7\u30e3\u30c4", "\\u30b7\\u30e3\\u30c4"),
        ("a\nb\tc", "a\\nb\\tc"),
        ("\x1b[31m", "\\x1b[31m"),
        ("\udc80", "\\udc80"),
        ("<b>&", "<b>&"),
    ],
)
def test_what_the_font_lacks_is_written_as_its_escape(text: str, expected: str) -> None:
    assert legible(text) == expected


@pytest.mark.parametrize("name", ["x" * 5000, "\u30b7" * 500, "../../etc/passwd\n<script>", "\udc80"])
def test_a_name_of_any_length_stays_in_its_card(name: str) -> None:
    """Whatever is written, the margins stay white, and so does the gap between two cards."""
    cards = [shown(row(i, 1.0, name=name)) for i in range(2)]
    sheet = pixels(draw_sheet(cards, (name, name), name, name))
    between = MARGIN + 3 * TILE + 2 * GAP
    for columns in (slice(0, MARGIN - 1), slice(-MARGIN + 1, None)):
        assert (sheet[:, columns] == 255).all()
    assert (sheet[MARGIN + 3 * LINE + 2 * GAP :, between + 1 : between + MARGIN - 1] == 255).all()


def test_the_sheet_is_the_same_to_the_bit_each_time() -> None:
    cards = [shown(row(i, 1.0 - i)) for i in range(5)]
    assert (pixels(draw_sheet(cards, NAMES, "t", "a")) == pixels(draw_sheet(cards, NAMES, "t", "a"))).all()
