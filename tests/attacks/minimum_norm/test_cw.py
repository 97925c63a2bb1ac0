"""C&W against closed forms, saturated pixels, negative logits, and images that must not wait for each other."""

from __future__ import annotations

import pytest
import torch

from tests.attacks.conftest import Wrapped, convolutional, labelled, linear
from tests.attacks.gradient.test_pgd import minimal_radius
from vlmdefend.attacks.minimum_norm._cw import into_tanh_space, out_of_tanh_space
from vlmdefend.attacks.minimum_norm.cw import Cw
from vlmdefend.attacks.view import View
from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng
from vlmdefend.types import Outputs, Threat


@pytest.mark.parametrize("shape", [(8,), (4, 6), (3, 8, 8)])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_the_norm_is_within_5_percent_of_the_known_minimum(shape: tuple[int, ...], count: int) -> None:
    model = linear(shape, 4)
    images, labels, ids = labelled(model, shape, count)
    radius = minimal_radius(model, images, labels, "l2")
    attack = Cw(steps=200, c=0.1)
    over = attack(View(model, ImageRng(0, ids)), images, labels, Threat("l2", radius * 1.05))
    assert over.fooled.all()
    under = attack(View(model, ImageRng(0, ids)), images, labels, Threat("l2", radius * 0.98))
    assert not under.fooled.any()


@pytest.mark.parametrize("count", [1, 8])
def test_a_target_is_reached_within_5_percent_of_the_known_minimum(count: int) -> None:
    model = linear((4, 6), 2)  # the only wrong class is the target
    images, labels, ids = labelled(model, (4, 6), count)
    radius = minimal_radius(model, images, labels, "l2")
    found = Cw(steps=200, c=0.1, target="least")(
        View(model, ImageRng(0, ids)), images, labels, Threat("l2", radius * 1.05)
    )
    assert found.fooled.all()


def test_a_target_is_pursued_past_the_nearest_wrong_class() -> None:
    model = linear((4, 6), 5)
    images, labels, ids = labelled(model, (4, 6), 6)
    view = View(model, ImageRng(0, ids), stop=False)
    threat = Threat("l2", 10.0)
    found = Cw(steps=150, searches=4, c=1.0, kappa=0.1, target=3).perturb(view, images, labels, threat, view.rng)
    targets = torch.where(labels == 3, 4, 3)
    assert torch.equal(view(found).argmax(1), targets)


def test_the_first_c_may_be_far_off_either_way() -> None:
    model = linear((4, 6), 4)
    images, labels, ids = labelled(model, (4, 6), 8)
    threat = Threat("l2", minimal_radius(model, images, labels, "l2") * 1.05)
    for c in (1e-3, 10.0):  # 10 is halved to what the nearest image needs, 0.005, by the last search
        assert Cw(steps=250, searches=12, c=c)(View(model, ImageRng(0, ids)), images, labels, threat).fooled.all()


def test_saturated_pixels_move_inwards() -> None:
    model = linear((12,), 3)
    images = (labelled(model, (12,), 6)[0] > 0.5).float()
    labels, ids = model(images).logits.argmax(1), [f"binary-{i}" for i in range(6)]
    assert out_of_tanh_space(into_tanh_space(images)).sub(images).abs().max() < 1e-6
    found = Cw(steps=1000, searches=6, c=0.1)(View(model, ImageRng(0, ids)), images, labels, Threat("l2", 3.0))
    assert found.fooled.all()
    assert (found.images.sub(images).abs().flatten(1).amax(1) > 0.01).all()


def test_negative_logits_change_no_verdict() -> None:
    """A mask by a product instead of minus infinity finds nothing where logits are negative."""
    model = convolutional(seed=9)
    images, labels, ids = labelled(model, (3, 8, 8), 12)
    attack, threat = Cw(steps=40, searches=4, c=0.1), Threat("l2", 0.15)
    plain = attack(View(model, ImageRng(0, ids)), images, labels, threat).fooled
    model.shift = -100.0
    assert torch.equal(attack(View(model, ImageRng(0, ids)), images, labels, threat).fooled, plain)
    assert plain.any()


def test_what_is_found_outside_the_ball_is_projected() -> None:
    model = linear((4, 6), 4)
    images, labels, ids = labelled(model, (4, 6), 6)
    radius = minimal_radius(model, images, labels, "l2") * 0.5
    view = View(model, ImageRng(0, ids))
    found = Cw(steps=100, searches=5, c=0.1).perturb(view, images, labels, Threat("l2", radius), view.rng)
    length = (found - images).flatten(1).norm(dim=1)
    assert torch.allclose(length, radius, rtol=1e-3)
    margin = lambda x: -minimal_radius(model, x, labels, "l2")  # noqa: E731
    assert (margin(found) > margin(images)).all()


def test_confidence_is_the_margin_in_logits() -> None:
    model = linear((4, 6), 4)
    images, labels, ids = labelled(model, (4, 6), 6)
    view = View(model, ImageRng(0, ids), stop=False)
    found = Cw(steps=200, searches=6, c=1.0, kappa=2.0)(view, images, labels, Threat("l2", 10.0))
    assert (found.margin >= 2.0).all()


def test_a_search_that_rests_ends_for_the_image_alone() -> None:
    model = linear((4, 6), 4).double()

    class InDouble(Wrapped):
        def forward(self, images: torch.Tensor, rng: ImageRng | None = None) -> Outputs:
            return Wrapped.forward(self, images.double(), rng)

    model.__class__ = InDouble
    images = labelled(linear((4, 6), 4), (4, 6), 5)[0]
    labels, ids = model(images).logits.argmax(1), [str(i) for i in range(5)]
    attack, threat = Cw(steps=400, searches=2, c=1.0), Threat("l2", 1e-4)
    together = attack(View(model, ImageRng(0, ids), width=2), images, labels, threat)
    alone = [attack(View(model, ImageRng(0, [ids[i]])), images[i : i + 1], labels[i : i + 1], threat) for i in range(5)]
    assert together.steps.tolist() == [int(one.steps) for one in alone]
    assert torch.allclose(together.images, torch.cat([one.images for one in alone]), atol=1e-6)
    assert len(set(together.steps.tolist())) > 1
    assert int(together.steps.max()) < 800


def test_tanh_space_and_back() -> None:
    images = torch.linspace(0, 1, 11)
    assert torch.allclose(out_of_tanh_space(into_tanh_space(images)), images, atol=1e-6)
    assert into_tanh_space(images).isfinite().all()


def test_wrong_options_are_refused() -> None:
    for options, message in [({"steps": 0}, "steps=0"), ({"c": 0.0}, "c=0"), ({"kappa": -1.0}, "kappa=-1")]:
        with pytest.raises(UserError, match=message):
            Cw(**options)
    model = linear((8,), 3)
    images, labels, ids = labelled(model, (8,), 2)
    with pytest.raises(UserError, match="not for linf"):
        Cw()(View(model, ImageRng(0, ids)), images, labels, Threat("linf", 0.1))
