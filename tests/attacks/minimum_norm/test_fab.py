"""FAB: its projection against brute force, closed forms, and the authors' code."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor, nn

from tests.attacks.conftest import Wrapped, convolutional, labelled, linear
from tests.attacks.gradient.test_pgd import minimal_radius
from vlmdefend.attacks import ATTACKS
from vlmdefend.attacks.minimum_norm._fab import onto_plane
from vlmdefend.attacks.view import View
from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng
from vlmdefend.types import Threat

NAMES = ["fab", "fab-t"]
SHAPE = (3, 8, 8)


def by_bisection(point: Tensor, normal: Tensor, gap: float, norm: str) -> Tensor:
    """The same projection for one point, by bisection on the step length."""
    direction = normal.sign() * (1 if gap > 0 else -1)
    room = torch.where(direction > 0, 1 - point, point)
    rate = torch.ones_like(normal) if norm == "linf" else normal.abs()

    def moved(length: float) -> Tensor:
        return direction * torch.minimum(length * rate, room)

    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if float((normal * moved(middle)).sum().abs()) < abs(gap) else (low, middle)
    return moved(high)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_projections_equal_bisection_and_close_the_gap(norm: str) -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(40, 12, generator=generator, dtype=torch.float64)
    points[3] = (points[3] > 0.5).double()
    normal = torch.randn(40, 12, generator=generator, dtype=torch.float64)
    normal[5, :6] = 0
    gap = torch.randn(40, generator=generator, dtype=torch.float64) * 2
    gap[7] = 0.0
    found = onto_plane(points, normal, gap, norm)
    assert ((points + found).clamp(0, 1) - (points + found)).abs().max() < 1e-12
    for i in range(40):
        expected = by_bisection(points[i], normal[i], float(gap[i]), norm)
        reachable = float((normal[i] * expected).sum()) == pytest.approx(float(gap[i]), abs=1e-6)
        assert torch.allclose(found[i], expected, atol=1e-9) or (not reachable and norm == "l2")
        closed = float((normal[i] * found[i]).sum())
        assert closed == pytest.approx(float((normal[i] * expected).sum()), abs=1e-9)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_plane_out_of_reach_is_approached_as_far_as_the_box_goes(norm: str) -> None:
    point, normal = torch.tensor([[0.2, 0.7, 0.5]]), torch.tensor([[1.0, -2.0, 0.0]])
    found = onto_plane(point, normal, torch.tensor([100.0]), norm)
    assert torch.allclose(point + found, torch.tensor([[1.0, 0.0, 0.5]]))
    still = onto_plane(point, torch.zeros(1, 3), torch.tensor([1.0]), norm)
    assert torch.equal(still, torch.zeros(1, 3))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("shape", [(8,), (4, 6), SHAPE])
@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("name", NAMES)
def test_reaches_the_known_minimum_of_a_linear_model(name: str, norm: str, shape: tuple[int, ...], count: int) -> None:
    model = linear(shape, 4)
    images, labels, ids = labelled(model, shape, count)
    radius = minimal_radius(model, images, labels, norm)
    reachable = radius * 1.05 < 0.2  # the box [0, 1] is no obstacle within the images' margin of 0.2
    attack = ATTACKS.create(name, steps=10)
    over = attack(View(model, ImageRng(0, ids)), images, labels, Threat(norm, radius * 1.05))
    assert over.fooled[reachable].all()
    assert over.outside == 0
    under = attack(View(model, ImageRng(0, ids)), images, labels, Threat(norm, radius * 0.98))
    assert not under.fooled.any()


@pytest.mark.parametrize(("norm", "theirs", "eps"), [("linf", "Linf", 2 / 255), ("l2", "L2", 0.1)])
@pytest.mark.parametrize("name", NAMES)
def test_is_no_weaker_than_the_authors_code(name: str, norm: str, theirs: str, eps: float) -> None:
    peer = importlib.import_module("pyautoattack.fab_pt")
    model = convolutional(seed=9)
    images, labels, ids = labelled(model, SHAPE, 30)
    state = torch.random.get_rng_state()
    options = {"norm": theirs, "eps": eps, "n_iter": 15, "targeted": name == "fab-t", "n_target_classes": 4}
    reference = peer.FABAttack_PT(nn.Sequential(model.body, model.head), **options)
    reference.device = images.device
    found = reference.perturb(images, labels)
    torch.random.set_rng_state(state)
    with torch.no_grad():
        fooled = (model(found).logits.argmax(1) != labels) & Threat(norm, eps).contains(found, images)
    ours = ATTACKS.create(name, steps=15)(View(model, ImageRng(0, ids)), images, labels, Threat(norm, eps))
    assert int(ours.fooled.sum()) >= int(fooled.sum()) > 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_active_set_fools_the_same_images_as_the_fixed_batch(name: str, norm: str) -> None:
    model = convolutional(seed=9)
    images, labels, ids = labelled(model, SHAPE, 16)
    threat = Threat(norm, {"linf": 3 / 255, "l2": 0.15}[norm])
    attack = ATTACKS.create(name, steps=6)
    views = [View(model, ImageRng(0, ids), width=8, stop=stop) for stop in (True, False)]
    one, two = (attack(view, images, labels, threat) for view in views)
    assert torch.equal(one.fooled, two.fooled)
    assert 0 < int(one.fooled.sum()) < 16
    assert int(one.steps.sum()) < int(two.steps.sum())
    forwards, backwards = attack.budget()
    assert int(views[1].queries.forwards.max()) <= forwards + 2
    assert int(views[1].queries.backwards.max()) <= backwards


@pytest.mark.parametrize("name", NAMES)
def test_more_restarts_never_help_the_model(name: str) -> None:
    model = convolutional(seed=9)
    images, labels, ids = labelled(model, SHAPE, 16)
    threat = Threat("linf", 1.5 / 255)
    one = ATTACKS.create(name, steps=3)(View(model, ImageRng(0, ids)), images, labels, threat)
    three = ATTACKS.create(name, steps=3, restarts=3)(View(model, ImageRng(0, ids)), images, labels, threat)
    assert (three.fooled | ~one.fooled).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes_are_enough(name: str, classes: int) -> None:
    model = linear((8,), classes)
    images, labels, ids = labelled(model, (8,), 8)
    found = ATTACKS.create(name, steps=10)(View(model, ImageRng(0, ids)), images, labels, Threat("linf", 0.6))
    assert found.fooled.any()


def test_a_gradient_that_vanishes_leaves_the_image_in_the_ball(conv: Wrapped) -> None:
    with torch.no_grad():
        conv.head.weight.zero_()
    images, labels, ids = labelled(conv, SHAPE, 3)
    found = ATTACKS.create("fab-t", steps=3)(View(conv, ImageRng(0, ids)), images, labels, Threat("l2", 0.1))
    assert not found.fooled.any()
    assert found.outside == 0


def test_wrong_options_are_refused() -> None:
    for name in NAMES:
        for option in ("steps", "restarts", "targets"):
            with pytest.raises(UserError, match=option):
                ATTACKS.create(name, **{option: 0})
