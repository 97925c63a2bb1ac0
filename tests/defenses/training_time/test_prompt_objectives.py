"""Objectives that learn prompts, against values worked out by hand on two images and three classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.defenses.training_time.test_training_time import (
    ADVERSARIAL,
    BATCH,
    CLEAN,
    CROSS_ENTROPY,
    FEATURES_ADVERSARIAL,
    FEATURES_CLEAN,
    IMAGES,
    KL_CLEAN,
    LN2,
    Says,
    check,
    is_clean,
    terms,
)
from vlmdefend.defenses.training_time import OBJECTIVES
from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng
from vlmdefend.types import Batch


def rng() -> ImageRng:
    return ImageRng(0, BATCH.ids, "test")


# apt


@pytest.mark.parametrize("prompting", ["on-the-fly", "constant", "perturbed"])
def test_apt_is_the_cross_entropy_at_the_adversarial_images(prompting: str) -> None:
    objective, student = OBJECTIVES.create("apt", steps=0, prompting=prompting), Linear()
    student.says = Says((CLEAN, FEATURES_CLEAN, IMAGES), (ADVERSARIAL, FEATURES_ADVERSARIAL, IMAGES))
    found = objective.losses(student, None, BATCH, rng())  # type: ignore[arg-type]
    assert list(found.losses) == ["cross_entropy"]
    check(found.losses["cross_entropy"], *CROSS_ENTROPY)
    check(found.metrics["accuracy_adversarial"], 0.0, 1.0)


WEIGHTS = torch.tensor([[1.0, -2.0], [0.5, 1.0], [-1.0, 0.25]])  # (C, M): the logits of two pixels


class Linear:
    """Logits are the first two pixels times class features; class features are three times the context."""

    context, hand_features = WEIGHTS / 3, -WEIGHTS
    says: Any = None

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, images: Tensor) -> Any:
        self.seen.append(images)
        return self.says(images)

    def classes_of(self, context: Tensor) -> Tensor:
        return 3 * context

    def attacked(self, images: Tensor, classes: Tensor | None = None) -> Tensor:
        return images[:, 0, 0, :2] @ (WEIGHTS if classes is None else classes).T


def ascended(
    start: Tensor, classes: Tensor, labels: Tensor, alpha: float, *, ascent: float = 0.0, steps: int
) -> Tensor:
    """(B, 2) pixels after signed steps along W^T (p - y), while W moves by 9 ascent times the mean of (p - y) x^T."""
    pixels, classes = start.clone(), classes.clone()
    for _ in range(steps):
        miss = (pixels @ classes.T).softmax(dim=1) - torch.eye(3)[labels]
        moved = pixels + alpha * (miss @ classes).sign()
        classes = classes + 9 * ascent * miss.T @ pixels / len(pixels)  # 3 of the map, 3 of its gradient
        pixels = moved
    return pixels


@pytest.mark.parametrize(
    ("options", "classes", "ascent"),
    [
        ({}, WEIGHTS, 0.0),
        ({"prompting": "constant"}, -WEIGHTS, 0.0),
        ({"prompting": "perturbed", "prompt_alpha": 2.0}, WEIGHTS, 2.0),
    ],
)
def test_the_attack_of_apt_follows_the_prompt_that_was_chosen(
    options: dict[str, Any], classes: Tensor, ascent: float
) -> None:
    eps, alpha, steps = 0.3, 0.02, 4
    objective, student = OBJECTIVES.create("apt", eps=eps, alpha=alpha, steps=steps, **options), Linear()
    student.says = Says((CLEAN, FEATURES_CLEAN, IMAGES), (ADVERSARIAL, FEATURES_ADVERSARIAL, IMAGES))
    objective.losses(student, None, BATCH, rng())  # type: ignore[arg-type]
    noise = rng().uniform(IMAGES.shape[1:], -1.0, 1.0)
    start = (IMAGES + eps * noise)[:, 0, 0, :2]
    expected = ascended(start, classes, BATCH.labels, alpha, ascent=ascent, steps=steps)
    within = expected.clamp(0.5 - eps, 0.5 + eps)  # no step before the last leaves the ball here, or it would stick
    assert torch.allclose(student.seen[0][:, 0, 0, :2], within, atol=1e-6)
    assert torch.equal(student.context, WEIGHTS / 3)  # put back


def test_a_perturbed_prompt_turns_the_attack_elsewhere() -> None:
    start = torch.tensor([[0.5, 0.5], [0.4, 0.6]])
    own, other = (ascended(start, WEIGHTS, BATCH.labels, 0.02, ascent=ascent, steps=4) for ascent in (0.0, 2.0))
    assert not torch.allclose(own, other)


def test_only_the_perturbed_prompt_needs_the_whole_batch() -> None:
    whole = [p for p in ("on-the-fly", "constant", "perturbed") if OBJECTIVES.create("apt", prompting=p).whole_batch]
    assert whole == ["perturbed"]


# fap


def test_fap_is_the_clean_cross_entropy_and_the_divergence_times_one_plus_the_cosine() -> None:
    found = terms("fap")
    check(found.losses["cross_entropy"], LN2, LN2)
    cosines = (3 / 5, 4 / 5)
    check(found.losses["divergence"], *(1.5 * kl * (1 + c) for kl, c in zip(KL_CLEAN, cosines, strict=True)))
    check(found.metrics["accuracy_clean"], 1.0, 1.0)
    check(found.metrics["accuracy_adversarial"], 0.0, 1.0)


def test_faps_gradient_flows_to_both_sides_of_the_divergence_and_to_its_cosine() -> None:
    logits = [values.log().requires_grad_() for values in (CLEAN, ADVERSARIAL)]
    features = [values.clone().requires_grad_() for values in (FEATURES_CLEAN, FEATURES_ADVERSARIAL)]

    class Student(Says):
        def __call__(self, images: Tensor) -> Any:
            which = 0 if is_clean(images) else 1
            return super().__call__(images)._replace(logits=logits[which], features=features[which])

    nothing = (CLEAN, FEATURES_CLEAN, IMAGES)
    objective = OBJECTIVES.create("fap", steps=0)
    found = objective.losses(Student(nothing, nothing), None, BATCH, rng()).losses["divergence"]
    assert all(bool((g != 0).any()) for g in torch.autograd.grad(found.sum(), [*logits, *features]))


def test_a_negative_weight_is_refused() -> None:
    with pytest.raises(UserError, match=r"fap: weight=-1.0 must be zero or more"):
        OBJECTIVES.create("fap", weight=-1)


# advpt


class Features:
    """Features are the first two pixels; the answers to stored features are written down."""

    def __init__(self, answers: Tensor = ADVERSARIAL) -> None:
        self.says = answers
        self.asked: list[Tensor] = []

    def attacked_features(self, images: Tensor) -> Tensor:
        return 40 * images[:, 0, 0, :2]

    def answers(self, features: Tensor) -> Tensor:
        self.asked.append(features)
        return self.says.log()


def test_advpt_is_the_cross_entropy_at_the_stored_features() -> None:
    student, stored = Features(), torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    batch = Batch(BATCH.ids, stored, BATCH.labels)
    found = OBJECTIVES.create("advpt").losses(student, None, batch, rng())  # type: ignore[arg-type]
    assert list(found.losses) == ["cross_entropy"]
    check(found.losses["cross_entropy"], *CROSS_ENTROPY)
    assert student.asked[0] is stored  # and no image was looked at


def test_advpt_stores_what_is_furthest_from_the_clean_softmax_of_the_features_and_reads_no_label() -> None:
    """Two entries: the divergence grows with the distance of their difference, so every step widens or narrows it."""
    objective, student = OBJECTIVES.create("advpt", eps=0.1, alpha=0.02, steps=10), Features()
    found = objective.stored(student, BATCH, rng())  # type: ignore[attr-defined]
    start = (IMAGES + 0.1 * rng().uniform(IMAGES.shape[1:], -1.0, 1.0))[:, 0, 0, :2]
    sign = (start[:, 0] - start[:, 1]).sign()
    expected = 40 * (0.5 + 0.1 * torch.stack([sign, -sign], dim=1))
    assert torch.allclose(found, expected, atol=1e-4)
    other = BATCH._replace(labels=BATCH.labels + 1)
    assert torch.equal(objective.stored(student, other, rng()), found)  # type: ignore[attr-defined]


def test_advpt_counts_the_image_tower_once() -> None:
    cost = OBJECTIVES.create("advpt").cost
    assert (cost.forward_backwards, cost.once) == (0, 11)


def test_the_published_attacks_are_the_defaults() -> None:
    apt, advpt, fap = (OBJECTIVES.create(name) for name in ("apt", "advpt", "fap"))
    assert (apt.eps, apt.steps, apt.alpha) == pytest.approx((4 / 255, 3, 8 / 3 / 255))  # type: ignore[attr-defined]
    assert (advpt.eps, advpt.steps, advpt.alpha) == pytest.approx((8 / 255, 10, 1.25 * 8 / 255 / 10))  # type: ignore[attr-defined]
    assert (fap.eps, fap.steps, fap.alpha) == (1 / 255, 2, 1 / 255)  # type: ignore[attr-defined]
