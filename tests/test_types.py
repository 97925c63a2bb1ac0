"""Radii as people write them, and the ball: projection, membership, random starts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng
from vlmdefend.types import Norm, Threat, format_eps, parse_eps, patch_side

NORMS: tuple[Norm, ...] = ("linf", "l2")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4/255", 4 / 255),
        (" 4 / 255 ", 4 / 255),
        ("4.0/255", 4 / 255),
        ("0.5/255", 0.5 / 255),
        (".5/255", 0.5 / 255),
        ("0.03", 0.03),
        (".03", 0.03),
        ("3e-2", 0.03),
        ("+0.03", 0.03),
        ("0", 0.0),
        ("0/255", 0.0),
    ],
)
def test_a_radius_is_read_as_people_write_it(text: str, expected: float) -> None:
    assert parse_eps(text) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("8", "did you mean 8/255?"),
        ("1", "did you mean 1/255?"),
        ("255", "did you mean 255/255?"),
        ("300", "as large as the whole pixel range"),
        ("256/255", "as large as the whole pixel range"),
        ("-1/255", "zero or more"),
        ("-0.1", "zero or more"),
        ("1/0", "divides by zero"),
        ("1/0.0", "divides by zero"),
        ("1e400", "finite"),
        ("nan", "not a finite number"),
        ("inf", "not a finite number"),
        ("abc", "not a finite number"),
        ("", "not a finite number"),
        ("4/", "not a finite number"),
        ("/255", "not a finite number"),
        ("4/255/2", "not a finite number"),
        ("4\\255", "not a finite number"),
        ("1_0/255", "not a finite number"),
        ("0,03", "not a finite number"),
    ],
)
def test_what_is_no_radius_is_refused_with_advice(text: str, advice: str) -> None:
    with pytest.raises(UserError) as raised:
        parse_eps(text)
    assert advice in str(raised.value)
    assert repr(text) in str(raised.value)


def test_an_l2_radius_may_be_larger_than_one() -> None:
    assert parse_eps("2", "l2") == 2.0


@given(st.integers(0, 254))
def test_a_radius_in_levels_of_255_survives_being_written(k: int) -> None:
    assert parse_eps(format_eps(k / 255)) == k / 255


@given(st.integers(0, 508))
def test_half_levels_survive_being_written(k: int) -> None:
    assert parse_eps(format_eps(k / 2 / 255)) == pytest.approx(k / 2 / 255, abs=1e-12)


@pytest.mark.parametrize(
    ("eps", "text"),
    [(0.0, "0"), (4 / 255, "4/255"), (0.5 / 255, "0.5/255"), (0.03, "0.03"), (0.5, "0.5"), (1.0, "1"), (2.0, "2")],
)
def test_a_radius_is_written_as_people_read_it(eps: float, text: str) -> None:
    assert format_eps(eps) == text


def test_a_radius_is_never_written_as_zero_unless_it_is() -> None:
    assert format_eps(1e-10) != "0"


# the ball


@st.composite
def balls(draw: st.DrawFn) -> tuple[Threat, Tensor, Tensor]:
    """A threat, clean images, and any images; one radius for all or one per image."""
    count = draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    around = torch.rand(count, 3, 4, 4, generator=generator)
    if draw(st.booleans()):
        around = around.round()  # corners of [0, 1]
    images = around + draw(st.sampled_from([0.0, 1e-4, 0.1, 10.0])) * torch.randn(around.shape, generator=generator)
    radii = [draw(st.sampled_from([0.0, 1e-6, 1 / 255, 4 / 255, 0.5, 3.0])) for _ in range(count)]
    eps = torch.tensor(radii) if draw(st.booleans()) else radii[0]
    return Threat(draw(st.sampled_from(NORMS)), eps), around, images


@settings(max_examples=150, deadline=None)
@given(balls())
def test_a_projection_is_inside_and_what_is_inside_stays(ball: tuple[Threat, Tensor, Tensor]) -> None:
    threat, around, images = ball
    before = images.clone()
    projected = threat.project(images, around)
    assert threat.contains(projected, around).all()
    assert torch.equal(images, before), "a new tensor"
    assert torch.allclose(threat.project(projected, around), projected, atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(balls())
def test_a_random_start_is_inside(ball: tuple[Threat, Tensor, Tensor]) -> None:
    threat, around, _ = ball
    start = threat.random_start(around, ImageRng(0, [str(i) for i in range(len(around))]))
    assert threat.contains(start, around).all()


@pytest.mark.parametrize("norm", NORMS)
def test_a_projection_is_the_nearest_point(norm: Norm) -> None:
    around, images = torch.full((1, 1, 1, 2), 0.5), torch.tensor([[[[0.9, 0.8]]]])
    expected = {"linf": [0.6, 0.6], "l2": [0.5 + 0.1 * 0.8, 0.5 + 0.1 * 0.6]}[norm]
    assert torch.allclose(Threat(norm, 0.1).project(images, around).flatten(), torch.tensor(expected))


@pytest.mark.parametrize("norm", NORMS)
def test_each_image_has_its_own_radius(norm: Norm) -> None:
    around = torch.full((3, 3, 4, 4), 0.5)
    threat = Threat(norm, torch.tensor([0.0, 0.01, 0.1]))
    moved = threat.project(around + 1, around)
    assert torch.allclose(threat.distance(moved, around).float(), torch.tensor([0.0, 0.01, 0.1]), atol=1e-6)
    part = threat.select(torch.tensor([2, 0]))
    assert part.contains(moved[[2, 0]], around[[2, 0]]).all()
    assert not part.contains(moved[[2, 1]], around[[2, 1]]).all()
    assert Threat(norm, 0.1).select(torch.tensor([0])).eps == 0.1


@pytest.mark.parametrize("norm", NORMS)
def test_membership_refuses_what_is_outside_of_the_ball_or_the_pixel_range_or_no_number(norm: Norm) -> None:
    around = torch.full((5, 3, 2, 2), 0.95)
    images = around.clone()
    images[0, 0, 0, 0] += 0.04  # inside
    images[1] -= 0.11
    images[2, 0, 0, 0] = 1.001
    images[3, 0, 0, 0] = torch.nan
    images[4, 0, 0, 0] = -torch.inf
    assert Threat(norm, 0.1).contains(images, around).tolist() == [True, False, False, False, False]


def test_an_l2_start_is_uniform_in_the_ball() -> None:
    """The mean radius of a uniform point of a d-dimensional ball is eps d / (d + 1)."""
    count, eps = 4000, 0.1
    for shape in ((1, 1, 2), (3, 2, 2)):
        around = torch.full((count, *shape), 0.5)
        start = Threat("l2", eps).random_start(around, ImageRng(3, [str(i) for i in range(count)]))
        radius = Threat("l2", eps).distance(start, around) / eps
        d = around[0].numel()
        assert float(radius.mean()) == pytest.approx(d / (d + 1), abs=0.02)
        assert float((start - around).mean()) == pytest.approx(0.0, abs=0.005), "no preferred direction"


def test_an_linf_start_is_uniform_in_the_box() -> None:
    around = torch.full((200, 3, 4, 4), 0.5)
    delta = Threat("linf", 0.1).random_start(around, ImageRng(3, [str(i) for i in range(200)])) - around
    assert float(delta.abs().mean()) == pytest.approx(0.05, abs=0.002)
    assert float(delta.mean()) == pytest.approx(0.0, abs=0.002)


def test_distance_is_measured_in_float64() -> None:
    around = torch.zeros(1, 3, 8, 8)
    images = around.clone()
    images[0, 0, 0, 0] = 1 / 255
    for norm in NORMS:
        distance = Threat(norm, 0.1).distance(images, around)
        assert distance.dtype == torch.float64
        assert float(distance) == pytest.approx(1 / 255, abs=1e-9)


@pytest.mark.parametrize(
    ("rows", "columns", "share"),
    [((2, 3), (4, 4), 4), ((0, 0), (0, 0), 1), ((0, 9), (3, 3), 100), ((1, 3), (2, 6), 25)],
)
def test_a_patch_is_measured_by_the_square_that_holds_it(
    rows: tuple[int, int], columns: tuple[int, int], share: int
) -> None:
    around = torch.rand(2, 3, 10, 10) * 0.5
    images = around.clone()
    images[0, 1, rows[0], columns[0]] += 0.25
    images[0, 2, rows[1], columns[1]] += 0.25
    threat = Threat("patch", 0.25)
    assert threat.distance(images, around).tolist() == [share / 100, 0.0]
    assert threat.contains(images, around).tolist() == [share <= 25, True]
    back = threat.project(images, around)
    assert torch.equal(back[0], images[0] if share <= 25 else around[0])
    assert torch.equal(back[1], around[1])


def test_corruptions_keep_the_pixel_range_only_and_text_attacks_no_pixel() -> None:
    around = torch.rand(1, 3, 4, 4)
    other = 1 - around
    assert Threat("corruption", 3).contains(other, around).all()
    assert not Threat("corruption", 3).contains(other + 1, around).any()
    assert not Threat("tokens", 3).contains(other, around).any()
    assert Threat("tokens", 3).contains(around, around).all()


@pytest.mark.parametrize(
    ("text", "norm", "value"), [("3", "corruption", 3.0), ("2", "tokens", 2.0), ("0.05", "patch", 0.05)]
)
def test_budgets_without_a_ball_are_read(text: str, norm: Norm, value: float) -> None:
    assert parse_eps(text, norm) == value


@pytest.mark.parametrize(
    ("text", "norm", "message"),
    [
        ("4/255", "corruption", "1 to 5"),
        ("6", "corruption", "1 to 5"),
        ("1.5", "tokens", "whole number"),
        ("2", "patch", "at most 1"),
    ],
)
def test_budgets_without_a_ball_are_refused(text: str, norm: Norm, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_eps(text, norm)


@pytest.mark.parametrize(
    ("eps", "height", "width", "side"), [(0.05, 32, 32, 7), (1.0, 8, 6, 6), (0.0, 8, 8, 0), (0.25, 10, 10, 5)]
)
def test_the_side_of_a_patch(eps: float, height: int, width: int, side: int) -> None:
    assert patch_side(eps, height, width) == side
