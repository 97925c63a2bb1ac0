"""A square that may hold anything: where it lies, how large it is, and that it was worth learning."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.attacks.conftest import Wrapped, convolutional, labelled
from vlmdefend.attacks.base import Attack
from vlmdefend.attacks.criterion import Criterion
from vlmdefend.attacks.losses import LOSSES
from vlmdefend.attacks.set_level._patch import corners, cut, paste, resized, window
from vlmdefend.attacks.set_level.patch import Patch
from vlmdefend.attacks.view import View
from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng
from vlmdefend.types import Threat

SHAPE = (3, 8, 8)


def learned(model: Wrapped, threat: Threat, **options: object) -> Patch:
    images, labels, ids = labelled(model, SHAPE, 40, seed=3)
    fitted = Patch(**options).fit(View(model, ImageRng(0, ids), width=16), images, labels, threat)  # type: ignore[arg-type]
    assert isinstance(fitted, Patch)
    return fitted


def fooled(attack: Attack, model: Wrapped, threat: Threat) -> int:
    images, labels, ids = labelled(model, SHAPE, 40, seed=3)
    return int(attack(View(model, ImageRng(0, ids)), images, labels, threat).fooled.sum())


def loss_of(attack: Patch, model: Wrapped, threat: Threat) -> float:
    images, labels, ids = labelled(model, SHAPE, 40, seed=3)
    view = View(model, ImageRng(0, ids))
    found = attack(view, images, labels, threat).images
    return float(LOSSES[attack.loss](view.outputs(found), Criterion(labels)).mean())


# the geometry


def test_a_patch_is_pasted_where_the_corner_says_and_nowhere_else() -> None:
    images = torch.zeros(2, 1, 3, 4)
    patch = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    found = paste(images, patch, torch.tensor([[0, 1], [1, 2]]))
    assert found[0, 0].tolist() == [[0, 1, 2, 0], [0, 3, 4, 0], [0, 0, 0, 0]]
    assert found[1, 0].tolist() == [[0, 0, 0, 0], [0, 0, 1, 2], [0, 0, 3, 4]]
    assert images.eq(0).all()
    each = paste(images, torch.stack([patch, 2 * patch]), torch.tensor([[0, 1], [1, 2]]))
    assert torch.equal(each[1], 2 * found[1])


def test_what_is_cut_out_is_what_was_pasted() -> None:
    generator = torch.Generator().manual_seed(0)
    images, patches = torch.rand(5, 3, 9, 7, generator=generator), torch.rand(5, 3, 4, 4, generator=generator)
    at = corners("random", 4, images, ImageRng(0, list("abcde")))
    found = paste(images, patches, at)
    assert torch.equal(cut(found, at, 4), patches)
    changed = (found != images).any(dim=1, keepdim=True)
    assert torch.equal(changed, window(at, 4, images))
    assert window(at, 4, images).sum((1, 2, 3)).tolist() == [16] * 5


def test_places_are_drawn_from_each_image_s_stream_and_reach_every_corner() -> None:
    images = torch.zeros(400, 3, 6, 5)
    ids = [str(i) for i in range(400)]
    at = corners("random", 3, images, ImageRng(0, ids))
    assert sorted({tuple(pair) for pair in at.tolist()}) == [(r, c) for r in range(4) for c in range(3)]
    alone = corners("random", 3, images[:1], ImageRng(0, ids[7:8]))
    assert torch.equal(alone[0], at[7])
    assert corners("center", 2, images[:1], ImageRng(0, ids)).tolist() == [[2, 1]]
    assert corners("corner", 2, images[:1], ImageRng(0, ids)).tolist() == [[4, 3]]


def test_a_resized_patch_keeps_its_colour_and_stays_within_0_and_1() -> None:
    patch = torch.full((3, 5, 5), 0.25)
    assert torch.allclose(resized(patch, 3), torch.full((3, 3, 3), 0.25), atol=1e-6)
    assert resized(patch, 5) is patch
    sharp = (torch.rand(3, 5, 5, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    for side in (2, 9):
        assert 0 <= resized(sharp, side).min() <= resized(sharp, side).max() <= 1


# the attack


@pytest.mark.parametrize("place", ["random", "center", "corner"])
@pytest.mark.parametrize("learn", ["set", "image"])
def test_the_rest_of_the_image_stays_to_the_bit_and_the_square_is_as_large_as_allowed(learn: str, place: str) -> None:
    model, threat = convolutional(), Threat("patch", 0.3)  # 0.3 of 64 pixels: 4 x 4
    attack = learned(model, threat, learn=learn, place=place)
    images, labels, ids = labelled(model, SHAPE, 6)
    found = attack.perturb(View(model, ImageRng(0, ids), stop=False), images, labels, threat, ImageRng(0, ids))
    assert (found != images).any(1).flatten(1).sum(1).tolist() == [16] * 6
    assert (threat.distance(found, images) == 16 / 64).all()
    if learn == "set":
        at = corners(place, 4, images, ImageRng(0, ids).child("place"))  # type: ignore[arg-type]
        assert attack.learned is not None
        assert torch.equal(cut(found, at, 4), attack.learned.expand(6, -1, -1, -1))


def alike_everywhere() -> Wrapped:
    """The mean of its features over the image: what a patch does to it hardly depends on the place."""
    model = convolutional()
    model.body = nn.Sequential(*list(model.body)[:-1], nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.head = nn.Linear(8, 5)
    with torch.no_grad():
        model.head.weight.copy_(10 * torch.randn(5, 8, generator=torch.Generator().manual_seed(1)))
        model.head.bias.zero_()
    return model


@pytest.mark.parametrize("loss", ["ce", "cw"])
@pytest.mark.parametrize("place", ["random", "center"])
def test_a_learned_patch_beats_random_ones(place: str, loss: str) -> None:
    """In what it was trained for, the mean of the loss; with the default loss also in the images it fools."""
    model, threat = alike_everywhere() if place == "random" else convolutional(), Threat("patch", 0.1)
    attack = learned(model, threat, place=place, loss=loss, ceiling=None)
    assert attack.learned is not None
    noise = [torch.rand(attack.learned.shape, generator=torch.Generator().manual_seed(s)) for s in range(5)]
    assert loss_of(attack, model, threat) > max(loss_of(attack._with(values), model, threat) for values in noise)
    if loss == Patch().loss:
        default = learned(model, threat, place=place)
        assert fooled(default, model, threat) > max(fooled(attack._with(values), model, threat) for values in noise)


@pytest.mark.parametrize("learn", ["set", "image"])
def test_a_larger_patch_fools_more(learn: str) -> None:
    model = convolutional()
    counts = [fooled(learned(model, t, learn=learn), model, t) for t in (Threat("patch", e) for e in (0.02, 0.1, 0.4))]
    assert counts == sorted(counts)
    assert counts[-1] > counts[0]


def test_a_patch_of_its_own_for_each_image_fools_more_than_one_for_all() -> None:
    model, threat = convolutional(), Threat("patch", 0.1)
    assert fooled(Patch(learn="image"), model, threat) > fooled(learned(model, threat), model, threat)


def test_the_best_place_for_a_patch_is_the_one_it_was_trained_at() -> None:
    """Only the lower right corner matters to this model: a patch elsewhere can do nothing, and the gradient says so."""
    model = convolutional()
    model.body[0].weight.requires_grad_(False)
    threat = Threat("patch", 0.15)  # 3 x 3

    class Corner(Wrapped):
        def forward(self, images: Tensor, rng: ImageRng | None = None):  # type: ignore[no-untyped-def]
            mask = torch.zeros(8, 8)
            mask[5:, 5:] = 1
            return Wrapped.forward(self, images * mask, rng)

    model.__class__ = Corner
    assert fooled(learned(model, threat, place="center"), model, threat) == 0
    assert fooled(learned(model, threat, place="corner"), model, threat) > 0


def test_it_learns_nothing_from_the_set_where_each_image_has_its_own() -> None:
    attack = Patch(learn="image", steps=7)
    assert attack.learns_from == 0
    assert attack.fit_budget(40) == (0, 0)
    assert attack.budget() == (8, 7)
    assert attack.keeps_best
    assert not Patch().keeps_best
    assert Patch(steps=7).fit_budget(40) == (280, 280)
    assert Patch(steps=7).budget() == (0, 0)


def test_the_cost_of_a_patch_per_image_is_what_it_says() -> None:
    model = convolutional()
    images, labels, ids = labelled(model, SHAPE, 10)
    view = View(model, ImageRng(0, ids), stop=False)
    attack = Patch(learn="image", steps=7)
    attack.perturb(view, images, labels, Threat("patch", 0.02), ImageRng(0, ids))
    assert view.queries.backwards.tolist() == [7] * 10
    assert view.queries.forwards.tolist() == [8] * 10


def test_images_of_another_size_get_a_patch_of_the_same_share() -> None:
    model, threat = convolutional(), Threat("patch", 0.25)
    attack = learned(model, threat)
    large = torch.rand(2, 3, 16, 12, generator=torch.Generator().manual_seed(0))
    ids = ["a", "b"]
    view = View(model, ImageRng(0, ids))
    found = attack.perturb(view, large, torch.zeros(2).long(), threat, ImageRng(0, ids))
    assert (found != large).any(1).flatten(1).sum(1).tolist() == [36, 36]  # 6 x 6 of 192 pixels


def test_it_says_to_fit_first_and_refuses_flat_images() -> None:
    model, threat = convolutional(), Threat("patch", 0.1)
    images, labels, ids = labelled(model, SHAPE, 3)
    with pytest.raises(UserError, match="has not learned it yet; call fit"):
        Patch()(View(model, ImageRng(0, ids)), images, labels, threat)
    with pytest.raises(UserError, match=r"needs images \(B, C, H, W\)"):
        Patch().fit(View(model, ImageRng(0, ids)), images.flatten(1), labels, threat)
