"""The numbers: attacks, the identity that ties them to the teacher, and the distance of domains."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vlmdefend.attacks.composite.autoattack import AutoAttack
from vlmdefend.errors import UserError
from vlmdefend.training.adaptation import measure
from vlmdefend.training.adaptation.measure import TargetNumbers, check_agreement, domain_distance, target_numbers
from vlmdefend.types import Batch, Outputs


class Bright:
    """Two classes: is the mean of the first channel above one half."""

    num_classes, stochastic = 2, False

    def __call__(self, images: Tensor, rng: object = None) -> Outputs:
        margin = images[:, 0].mean(dim=(1, 2)) - 0.5
        return Outputs(torch.stack([-margin, margin], dim=1))


def batch(levels: list[float], labels: list[int]) -> Batch:
    images = torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).contiguous()
    return Batch([str(i) for i in range(len(levels))], images, torch.tensor(labels))


def test_the_numbers_of_a_linear_model_are_those_of_its_margins() -> None:
    # margins 0.3, 0.05, -0.05, 0.3 for class 1; labels 1, 1, 1, 0; the teacher says 1, 1, 0, 1 as the model does
    found = target_numbers(Bright(), batch([0.8, 0.55, 0.45, 0.8], [1, 1, 1, 0]), torch.tensor([1, 1, 0, 1]), 0.1, 0)
    assert found.clean.hits == 2
    assert found.true_labels.hits == 1  # the first alone is further from the border than eps
    assert found.pseudo_labels.hits == 2  # driven from the teacher's wrong class, the third becomes right
    assert found.worst.hits == 1
    assert found.disagreement.hits == 2
    assert TargetNumbers.read(found.spec()) == found


def test_at_eps_zero_all_numbers_are_the_clean_one() -> None:
    found = target_numbers(Bright(), batch([0.8, 0.55, 0.3], [1, 1, 1]), torch.tensor([1, 1, 0]), 0.0, 0)
    assert {found.clean.hits, found.true_labels.hits, found.pseudo_labels.hits, found.worst.hits} == {2}
    assert found.disagreement.hits == 0


def test_counts_that_break_the_identity_are_refused() -> None:
    check_agreement(robust=5, teacher_clean=8, disagreed=3)
    with pytest.raises(UserError, match="4 images are right under attack, fewer than the 8"):
        check_agreement(robust=4, teacher_clean=8, disagreed=3)


def test_domains_far_apart_have_distance_two_and_equal_ones_next_to_none() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(400, 3, generator=generator) for _ in range(2))
    apart = domain_distance(first, second + torch.tensor([20.0, 0.0, 0.0]))
    assert (apart.errors, apart.n, apart.distance) == (0, 400, 2.0)
    alike = domain_distance(first, second)
    assert alike.n == 400
    assert alike.distance < 0.3
    between = domain_distance(first, second + torch.tensor([1.0, 0.0, 0.0]))
    # two unit normals one apart: the best error is Phi(-1/2) = 0.309
    assert between.errors / between.n == pytest.approx(0.309, abs=0.06)


def test_sets_of_unequal_size_are_compared_at_equal_size() -> None:
    first, second = torch.zeros(100, 2), torch.ones(10, 2)
    assert domain_distance(first, second).n == 10
    with pytest.raises(UserError, match="four held-out images"):
        domain_distance(first, second[:3])


# what is attacked is what is scored, and a stronger attack finds no less


class Lines:
    """Four classes on a ring of the first two channels' means: a model that PGD breaks in part. It counts its calls."""

    num_classes, stochastic = 4, False

    def __init__(self) -> None:
        self.attacked, self.scored = 0, 0

    def __call__(self, images: Tensor, rng: object = None) -> Outputs:
        self.attacked += int(images.requires_grad) * len(images)
        self.scored += int(not torch.is_grad_enabled()) * len(images)
        x, y = (images[:, :2].mean(dim=(2, 3)) - 0.5).unbind(1)
        ripple = 0.02 * torch.sin(40 * images[:, 2].mean(dim=(1, 2)))  # what a gradient step does not see through
        return Outputs(torch.stack([x + ripple, -x, y - ripple, -y], dim=1))


def ring(count: int = 60) -> Batch:
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(count, 3, 1, 1, generator=generator).expand(-1, -1, 4, 4).contiguous()
    model = Lines()
    return Batch([str(i) for i in range(count)], images, model(images).logits.argmax(dim=1))


def test_the_object_that_is_attacked_is_the_one_that_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ring()
    model, seen = Lines(), []
    view = measure.View
    monkeypatch.setattr(measure, "View", lambda pipeline, *a, **k: seen.append(pipeline) or view(pipeline, *a, **k))
    target_numbers(model, given, given.labels, 0.1, 0)
    assert seen == [model, model]
    assert model.attacked > 0
    assert model.scored >= 3 * len(given.ids)  # the clean images, and those of either attack


def test_autoattack_leaves_no_more_right_than_pgd_does() -> None:
    given = ring()
    pgd = target_numbers(Lines(), given, given.labels, 0.1, 0)
    auto = target_numbers(Lines(), given, given.labels, 0.1, 0, AutoAttack(steps=10, queries=100))
    assert 0 < pgd.true_labels.hits < pgd.clean.hits == auto.clean.hits == 60
    assert auto.true_labels.hits <= pgd.true_labels.hits
    assert auto.worst.hits <= pgd.worst.hits


def test_right_under_attack_are_no_fewer_than_the_teachers_less_the_disagreement() -> None:
    given = ring()
    other = (given.labels + (torch.arange(60) % 3 == 0)) % 4  # a teacher that is wrong on every third image
    found = target_numbers(Lines(), given, other, 0.05, 0)
    assert found.pseudo_labels.hits >= int((other == given.labels).sum()) - found.disagreement.hits
    assert found.disagreement.hits >= 20  # on each of those the student says the true class, or a third one
