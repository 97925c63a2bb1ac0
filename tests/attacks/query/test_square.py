"""Square: its schedule, its patterns, its proposals, and what it reaches without a gradient."""

from __future__ import annotations

import importlib

import pytest
import torch

from tests.attacks.conftest import convolutional, labelled, linear
from vlmdefend.attacks.query._square import (
    bump,
    grid_of_tiles,
    patterns,
    put_square,
    put_stripes,
    shift_energy,
    window_sides,
)
from vlmdefend.attacks.query.square import Square
from vlmdefend.attacks.view import View
from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng
from vlmdefend.types import Threat

SHAPE = (3, 8, 8)


def drawn(count: int, channels: int = 3) -> torch.Tensor:
    return torch.rand(count, 5 + channels, generator=torch.Generator().manual_seed(0))


def test_the_schedule_halves_the_share_at_the_published_queries() -> None:
    sides = window_sides(10_000, 0.8, 512, 512, "linf", rescale=True)
    changes = [i for i in range(1, len(sides)) if sides[i] != sides[i - 1]]
    assert changes == [11, 51, 201, 501, 1001, 2001, 4001, 6001, 8001]
    assert sides[0] == round((0.8 * 512 * 512) ** 0.5)
    assert sides[-1] == round((0.8 / 512 * 512 * 512) ** 0.5)
    stretched = window_sides(5_000, 0.8, 512, 512, "linf", rescale=True)
    assert stretched == sides[::2]
    assert window_sides(5_000, 0.8, 512, 512, "linf", rescale=False) == sides[:5_000]


def test_windows_are_never_larger_than_the_image_and_odd_under_l2() -> None:
    for height, width in ((8, 8), (5, 9), (32, 16), (2, 2)):
        for norm in ("linf", "l2"):
            sides = window_sides(100, 1.0, height, width, norm, rescale=True)
            assert 1 <= min(sides) <= max(sides) <= min(height, width)
    assert all(side % 2 for side in window_sides(200, 0.8, 224, 224, "l2", rescale=True))


def test_a_bump_is_two_pyramids_of_opposite_sign_and_unit_norm() -> None:
    for side in (1, 3, 7, 20):
        pattern = bump(side)
        assert pattern.norm().item() == pytest.approx(1.0)
        assert (pattern[: side // 2] > 0).all()
        assert (pattern[side // 2 :] < 0).all()
    low = bump(7)[3:]  # rows 3 to 6: a pyramid of 4 rows and 7 columns with its top at row 2, column 3
    assert low.argmin().item() == 2 * 7 + 3
    assert low[2, 3] / low[2, 0] == pytest.approx((1 + 1 / 4 + 1 / 9 + 1 / 16) * 16)


def test_a_square_repaints_one_window_to_the_ends_of_the_ball() -> None:
    images = torch.rand(6, *SHAPE, generator=torch.Generator().manual_seed(1))
    best = put_stripes(images, 0.1, ImageRng(0, [str(i) for i in range(6)]))
    assert (best == best.clamp(0, 1)).all()
    side = torch.tensor([1, 2, 3, 5, 8, 4])
    found = put_square(best, images, 0.1, side, drawn(6))
    ends = torch.stack([(images + 0.1).clamp(max=1), (images - 0.1).clamp(min=0)])
    for i in range(6):
        rows, columns = (found[i] != best[i]).any(0).nonzero(as_tuple=True)
        if len(rows):
            assert int(rows.max() - rows.min()) < side[i]
            assert int(columns.max() - columns.min()) < side[i]
    assert ((found == ends[0]) | (found == ends[1])).all()


def test_every_window_of_the_image_can_be_drawn() -> None:
    images = torch.full((1, 1, 4, 6), 0.5)
    hit = torch.zeros(4, 6, dtype=torch.bool)
    for row in torch.linspace(0, 0.9999, 9):
        for column in torch.linspace(0, 0.9999, 13):
            numbers = torch.tensor([[row, column, 0, 0, 0, 0.0]])
            hit |= (put_square(images, images, 0.1, torch.tensor([2]), numbers) != images)[0, 0]
    assert hit.all()


def test_energy_moves_between_windows_and_the_radius_is_used_up() -> None:
    count = 8
    images = torch.full((count, *SHAPE), 0.5)
    best = grid_of_tiles(images, 0.4, ImageRng(0, [str(i) for i in range(count)]))
    assert torch.allclose((best - images).flatten(1).norm(dim=1), torch.tensor(0.4))
    side = torch.tensor([3, 5, 7, 3, 5, 7, 3, 3])
    found = shift_energy(best, images, 0.4, side, drawn(count), patterns(side, 8, 8, images.device))
    assert torch.allclose((found - images).flatten(1).norm(dim=1), torch.tensor(0.4))
    assert (found != best).flatten(1).any(1).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_active_set_fools_the_same_images_as_the_fixed_batch(norm: str) -> None:
    model = convolutional(seed=9)
    images, labels, ids = labelled(model, SHAPE, 30)
    threat = Threat(norm, {"linf": 3 / 255, "l2": 0.3}[norm])
    attack = Square(queries=80)
    views = [View(model, ImageRng(0, ids), width=8, stop=stop) for stop in (True, False)]
    one, two = (attack(view, images, labels, threat) for view in views)
    assert torch.equal(one.fooled, two.fooled)
    assert 0 < int(one.fooled.sum()) < 30
    assert (two.margin >= one.margin).all()
    assert int(views[0].queries.forwards.sum()) < int(views[1].queries.forwards.sum()) == 30 * (attack.budget()[0] + 2)
    assert int(views[0].queries.backwards.sum()) == 0


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_more_queries_come_near_the_minimum_of_a_linear_model(norm: str) -> None:
    from tests.attacks.gradient.test_pgd import minimal_radius

    model = linear(SHAPE, 4)
    images, labels, ids = labelled(model, SHAPE, 6)
    radius = minimal_radius(model, images, labels, norm)
    factor = {"linf": 1.5, "l2": 4.0}[norm]
    over = Square(queries=1000)(View(model, ImageRng(0, ids)), images, labels, Threat(norm, radius * factor))
    assert over.fooled.all()
    under = Square(queries=300)(View(model, ImageRng(0, ids)), images, labels, Threat(norm, radius * 0.98))
    assert not under.fooled.any()


@pytest.mark.parametrize(("norm", "theirs", "eps"), [("linf", "Linf", 3 / 255), ("l2", "L2", 0.3)])
def test_is_no_weaker_than_the_authors_code(norm: str, theirs: str, eps: float) -> None:
    peer = importlib.import_module("pyautoattack.square")
    model = convolutional(seed=7)
    images, labels, ids = labelled(model, SHAPE, 40)
    state = torch.random.get_rng_state()
    reference = peer.SquareAttack(
        lambda x: model(x).logits.detach().clone(), norm=theirs, n_queries=300, eps=eps, seed=0, resc_schedule=True
    )
    found = reference.perturb(images.clone(), labels)
    torch.random.set_rng_state(state)
    fooled = int((model(found).logits.argmax(1) != labels).sum())
    ours = Square(queries=300)(View(model, ImageRng(0, ids)), images, labels, Threat(norm, eps))
    assert int(ours.fooled.sum()) >= fooled > 0


def test_wrong_options_and_shapes_are_refused() -> None:
    for options in ({"queries": 0}, {"p_init": 0.0}, {"p_init": 1.5}):
        with pytest.raises(UserError, match="square"):
            Square(**options)
    model = linear((8,), 4)
    images, labels, ids = labelled(model, (8,), 2)
    with pytest.raises(UserError, match="B, C, H, W"):
        Square()(View(model, ImageRng(0, ids)), images, labels, Threat("linf", 0.1))
