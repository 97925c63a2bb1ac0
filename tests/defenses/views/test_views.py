"""Augmented views, and the two ways to combine them without a gradient: the ensemble and the mean shift."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from vlmdefend.defenses.test_time.ensemble import Ensemble
from vlmdefend.defenses.test_time.mta import Mta
from vlmdefend.defenses.views import crops
from vlmdefend.defenses.views.crops import augmented_views, entropy, most_confident, pick, predict_views
from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng
from vlmdefend.types import Outputs


class Places:
    """Logits are the pixel means of red, green and blue; features are the logits."""

    num_classes, stochastic = 3, False

    def __init__(self, *, features: bool = True) -> None:
        self.shows, self.asked = features, 0

    def __call__(self, images: torch.Tensor, rng: ImageRng) -> Outputs:
        assert len(images) == len(rng)
        self.asked += len(images)
        means = images.mean(dim=(2, 3))
        return Outputs(means, means if self.shows else None)


def ramps(count: int, size: int = 24) -> torch.Tensor:
    """Red holds the row, green the column, blue the square of the column, as shares of the side."""
    place = (torch.arange(size) + 0.5) / size
    image = torch.stack([place[:, None].expand(size, size), place.expand(size, size), (place**2).expand(size, size)])
    return image.expand(count, -1, -1, -1)


def boxes(views: torch.Tensor) -> torch.Tensor:
    """(V, 4) top, left, height, width as shares, read off the slopes of views of :func:`ramps`; flips undone."""
    size = views.shape[-1]
    middle = slice(size // 2 - 2, size // 2 + 2)
    rows, columns = views[:, 0].mean(dim=2), views[:, 1].mean(dim=1)
    height = (rows[:, middle].diff(dim=1).mean(dim=1)) * size
    width = columns[:, middle].diff(dim=1).mean(dim=1).abs() * size
    return torch.stack([rows.mean(dim=1) - height / 2, columns.mean(dim=1) - width / 2, height, width], dim=1)


def test_views_are_the_image_and_crops_of_the_size_and_shape_of_torchvision() -> None:
    views = augmented_views(ramps(1), ImageRng(0, ["a"]), 2000)[0]
    assert torch.equal(views[0], ramps(1)[0])
    top, left, height, width = boxes(views[1:]).unbind(dim=1)
    rounding = 1 / 24
    area, ratio = height * width, width / height
    assert area.min() > 0.08 - rounding
    assert area.max() <= 1 + 1e-3
    assert ratio.max() < 4 / 3 * 1.2  # whole pixels of small boxes
    assert ratio.min() > 3 / 4 / 1.2
    for first, length in ((top, height), (left, width)):
        assert first.min() > -1e-3
        assert (first + length).max() < 1 + 1e-3
    flipped = views[1:, 1].mean(dim=1).diff(dim=1).mean(dim=1) < 0
    assert 0.45 < flipped.float().mean() < 0.55


def test_the_areas_have_the_distribution_of_torchvision() -> None:
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    canvas = torch.zeros(3, 224, 224)
    theirs = [RandomResizedCrop.get_params(canvas, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)]
    reference = torch.tensor([[h, w] for _, _, h, w in theirs]).double()
    draws = ImageRng(0, ["a"]).uniform((4000, 23))
    down, across = crops._boxes(draws, 224, 224, (0.08, 1.0))
    ours = torch.stack([down.length[0], across.length[0]], dim=1).double()
    assert torch.allclose(ours.mean(dim=0), reference.mean(dim=0), rtol=0.02)
    assert torch.allclose(ours.std(dim=0), reference.std(dim=0), rtol=0.04)
    assert (ours.prod(dim=1).sort().values / reference.prod(dim=1).sort().values - 1).abs().median() < 0.05
    assert torch.equal(down.first, down.first.floor())
    assert (down.first + down.length).max() == 224


def test_each_image_has_its_own_views_whoever_is_in_the_batch() -> None:
    images = ramps(5)
    together = augmented_views(images, ImageRng(3, list("abcde")), 16)
    alone = augmented_views(images[2:3], ImageRng(3, ["c"]), 16)
    assert torch.allclose(together[2], alone[0], atol=1e-6)
    assert not torch.allclose(together[0], together[1], atol=1e-2)
    again = ImageRng(3, list("abcde"))
    first, second = augmented_views(images, again, 16), augmented_views(images, again, 16)
    assert torch.equal(first, together)
    assert not torch.equal(first, second)


def test_views_are_predicted_some_at_a_time_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    views = augmented_views(ramps(3), ImageRng(0, list("abc")), 7)
    whole = predict_views(Places(), views, ImageRng(0, list("abc")))
    monkeypatch.setattr(crops, "AT_ONCE", 4)
    parts = predict_views(Places(), views, ImageRng(0, list("abc")))
    assert whole.logits.shape == (3, 7, 3)
    assert torch.allclose(whole.logits, parts.logits, atol=1e-6)
    assert torch.allclose(whole.logits, views.mean(dim=(3, 4)), atol=1e-6)


def test_the_confident_views_are_those_of_low_entropy() -> None:
    logits = torch.tensor([[[0.0, 0.0], [9.0, 0.0], [1.0, 0.0], [0.0, 5.0]]])
    assert entropy(logits)[0, 0] == pytest.approx(math.log(2))
    assert sorted(most_confident(logits, 0.5)[0].tolist()) == [1, 3]
    assert most_confident(logits, 0.01).tolist() == [[1]]
    assert torch.equal(pick(logits, torch.tensor([[3, 1]])), logits[:, [3, 1]])


def test_the_ensemble_averages_logits_probabilities_or_votes() -> None:
    logits = torch.tensor([[[2.0, 0.0, 0.0], [2.0, 0.0, 0.0], [0.0, 9.0, 0.0]]])
    assert torch.allclose(Ensemble().combine(logits), torch.tensor([[4 / 3, 3.0, 0.0]]))
    mean = logits.softmax(dim=-1).mean(dim=1)
    assert torch.allclose(Ensemble(average="probabilities").combine(logits), mean.log(), atol=1e-5)
    votes = Ensemble(average="votes").combine(logits)
    assert torch.allclose(votes.exp(), (torch.tensor([[2.0, 1.0, 0.0]]) + mean) / 4, atol=1e-5)
    assert votes.argmax() == 0
    assert Ensemble(average="logits").combine(logits).argmax() == 1
    tie = torch.tensor([[[2.0, 0.0], [0.0, 3.0]]])
    assert Ensemble(average="votes").combine(tie).argmax() == 1


def test_the_ensemble_asks_for_every_view_and_averages_those_it_keeps() -> None:
    model, images = Places(), ramps(2)
    views = augmented_views(images, ImageRng(0, ["a", "b"]), 8).mean(dim=(3, 4))
    found = Ensemble(views=8).wrap(model)(images, ImageRng(0, ["a", "b"]))
    assert model.asked == 16
    assert torch.allclose(found.logits, views.mean(dim=1), atol=1e-6)
    kept = entropy(views).argsort(dim=1)[:, :2]
    half = Ensemble(views=8, keep=0.25).wrap(model)(images, ImageRng(0, ["a", "b"]))
    assert torch.allclose(half.logits, torch.stack([v[k].mean(dim=0) for v, k in zip(views, kept, strict=True)]))


def test_the_ensemble_averages_mixed_views_with_that_option() -> None:
    views = augmented_views(ramps(2), ImageRng(0, ["a", "b"]), 8, mixed=True).mean(dim=(3, 4))
    found = Ensemble(views=8, augmix=True).wrap(Places())(ramps(2), ImageRng(0, ["a", "b"]))
    assert torch.allclose(found.logits, views.mean(dim=1), atol=1e-6)
    assert not torch.allclose(found.logits, Ensemble(views=8).wrap(Places())(ramps(2), ImageRng(0, ["a", "b"])).logits)


def test_voting_views_have_a_surrogate_with_a_gradient() -> None:
    pixels = ramps(1).clone().requires_grad_(True)
    voting = Ensemble(views=4, average="votes")
    logits = voting.surrogate(Places())(pixels, ImageRng(0, ["a"])).logits
    assert torch.autograd.grad(logits[0, 0], pixels)[0].abs().sum() > 0


def test_the_ensemble_takes_no_crop_below_its_smallest_share() -> None:
    images, streams = ramps(1), ImageRng(0, ["a"])
    views = augmented_views(images, streams, 8, area=(0.9, 1.0)).mean(dim=(3, 4))
    found = Ensemble(views=8, smallest=0.9).wrap(Places())(images, ImageRng(0, ["a"]))
    assert torch.allclose(found.logits, views.mean(dim=1), atol=1e-6)
    with pytest.raises(UserError, match="smallest=0"):
        Ensemble(smallest=0.0)


def official_mta(features: torch.Tensor, logits: torch.Tensor, rounds: int, inner: int) -> torch.Tensor:
    """One image, as the paper writes it: (V, D) unit embeddings and (V, C) logits -> the mode (D,)."""
    count = len(features)
    bandwidth = []
    for i in range(count):
        squares = sorted(float((features[i] - features[j]).square().sum()) for j in range(count) if j != i)
        nearest = squares[: max(1, int(0.3 * (count - 1)))]
        bandwidth.append(0.5 * sum(nearest) / len(nearest))
    h2 = torch.tensor(bandwidth)
    p = logits.softmax(dim=1)
    y, mode = torch.full((count,), 1 / count), features[0]

    def kernel(m: torch.Tensor) -> torch.Tensor:
        return torch.exp(-(features - m).square().sum(dim=1) / (2 * h2))

    for _ in range(rounds):
        density = kernel(mode)
        for _ in range(inner):
            y = F.softmax((density + 4.0 * (p @ p.T) @ y) / 0.2, dim=0)
        for _ in range(inner):
            weights = kernel(mode) * y
            mode = F.normalize((weights[:, None] * features).sum(dim=0) / weights.sum(), dim=0)
    return mode


@pytest.mark.parametrize(("rounds", "inner"), [(1, 1), (2, 3), (5, 5)])
def test_mta_finds_the_mode_of_its_algorithm_for_every_image_of_a_batch(rounds: int, inner: int) -> None:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(3, 12, 5, generator=generator) * 0.3 + torch.tensor([1.0, 0, 0, 0, 0])
    text = F.normalize(torch.randn(4, 5, generator=generator), dim=1)
    units = F.normalize(features, dim=-1)
    logits = 10 * units @ text.T
    share = Mta(rounds=rounds, repeats=inner).shares(features * 7.0, logits)  # any length of the embedding
    for i in range(3):
        mode = official_mta(units[i], logits[i], rounds, inner)
        assert torch.allclose(share[i] @ units[i], mode, atol=1e-4)
        assert torch.allclose(share[i] @ logits[i], 10 * mode @ text.T, atol=1e-3)


def test_mta_by_hand_for_two_views() -> None:
    """At right angles, alike predictions (smoothness adds the same to both): everything but K is symmetric.

    Both bandwidths are h^2 = 2/2 = 1. K = (1, e^-1) at m = z_0, so y = softmax(K / 0.2), and the mode is along
    (y_0, e^-1 y_1).
    """
    features, logits = torch.eye(2)[None], torch.zeros(1, 2, 3)
    share = Mta(rounds=1, repeats=1).shares(features, logits)[0]
    first = 1 / (1 + math.exp((math.exp(-1) - 1) / 0.2))
    along = torch.tensor([first, math.exp(-1) * (1 - first)])
    assert torch.allclose(share, along / along.norm(), atol=1e-5)


def test_mta_is_differentiable_where_views_coincide() -> None:
    features = torch.ones(1, 6, 4).requires_grad_(True)
    share = Mta().shares(features, torch.zeros(1, 6, 3))
    (gradient,) = torch.autograd.grad((share[..., None] * features).sum(), features)
    assert gradient.isfinite().all()


def test_mta_is_attacked_through_the_mean_over_large_crops() -> None:
    wanted, pixels = torch.tensor([1.0, -2.0, 0.5]), ramps(1).clone().requires_grad_(True)
    surrogate = Mta(views=6).surrogate(Places())
    (found,) = torch.autograd.grad((surrogate(pixels, ImageRng(0, ["a"])).logits * wanted).sum(), pixels)
    means = augmented_views(pixels, ImageRng(0, ["a"]), 6, area=(0.5, 1.0)).mean(dim=(3, 4)).mean(dim=1)
    (expected,) = torch.autograd.grad((means * wanted).sum(), pixels)
    assert torch.allclose(found, expected, atol=1e-7)
    deployed = Mta(views=6).wrap(Places())(ramps(1), ImageRng(0, ["a"]))
    assert torch.equal(surrogate(ramps(1), ImageRng(0, ["a"])).logits, deployed.logits)


def test_mta_without_features_says_what_to_do() -> None:
    with pytest.raises(UserError, match="ensemble"):
        Mta(views=4).wrap(Places(features=False))(ramps(1), ImageRng(0, ["a"]))
