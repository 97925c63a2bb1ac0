"""Tests of the HPT-GPD objective: closed forms of its loss and attack, and what they leave unchanged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.training.conftest import CLASSES, EPS, TEMPLATES, batch_of, classifier, student_of
from vlmdefend.defenses.training_time._attack import train_pgd
from vlmdefend.defenses.training_time.hpt_gpd import HptGpd, divergence_of
from vlmdefend.errors import UserError
from vlmdefend.models.clip.vision_language import VisionLanguageModel
from vlmdefend.rng import ImageRng
from vlmdefend.training.clip.classifier import TrainedClassifier
from vlmdefend.types import Outputs

N, C = 5, 7


def logits(seed: int) -> Tensor:
    return torch.randn(N, C, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


def kl(first: Tensor, second: Tensor) -> Tensor:
    """Equation 6, term by term."""
    return torch.stack(
        [sum(a * torch.log(a / b) for a, b in zip(p, q, strict=True)) for p, q in zip(first, second, strict=True)]
    )


class RecordingTeacher:
    """A teacher that records the images of its forwards."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.seen = inner, []

    def __call__(self, images: Tensor) -> Outputs:
        self.seen.append(images.clone())
        return self.inner(images)


def rng_for(batch: Any, seed: int = 0) -> ImageRng:
    return ImageRng(seed, batch.ids, "test")


# the loss


def test_proxy_first_is_kl_of_proxy_and_target_and_its_gradient_is_the_difference_of_probabilities() -> None:
    target, proxy = logits(0).requires_grad_(), logits(1)
    p_target, p_proxy = target.softmax(1), proxy.softmax(1)
    loss = divergence_of(target, proxy, "proxy-first")
    assert torch.allclose(loss, kl(p_proxy, p_target))
    (gradient,) = torch.autograd.grad(loss.sum(), target)
    assert torch.allclose(gradient, p_target - p_proxy, atol=1e-12)


def test_target_first_is_equation_5_and_has_its_gradient() -> None:
    target, proxy = logits(0).requires_grad_(), logits(1)
    p_target, p_proxy = target.softmax(1), proxy.softmax(1)
    loss = divergence_of(target, proxy, "target-first")
    each = kl(p_target, p_proxy)
    assert torch.allclose(loss, each)
    (gradient,) = torch.autograd.grad(loss.mean(), target)
    assert torch.allclose(gradient, p_target * (p_target.log() - p_proxy.log() - each[:, None]) / N, atol=1e-12)


def test_at_logit_scale_1_the_two_directions_agree_to_second_order() -> None:
    cosines, other = torch.rand(N, C, dtype=torch.float64) * 0.3, torch.rand(N, C, dtype=torch.float64) * 0.3
    first, second = (divergence_of(cosines, other, d) for d in ("proxy-first", "target-first"))
    assert torch.allclose(first, second, rtol=0.1)


@pytest.mark.parametrize(("anchored", "eps"), [(False, EPS), (True, 0.0)])
def test_a_proxy_with_the_targets_own_weights_gives_no_loss_and_no_gradient(
    target: VisionLanguageModel, anchored: bool, eps: float
) -> None:
    student, batch = student_of(target), batch_of(4)
    objective = HptGpd(anchored=anchored, eps=eps, alpha=eps)
    terms = objective.losses(student, classifier(target), batch, rng_for(batch))
    loss = terms.losses["ga" if anchored else "hpt"]
    assert loss.abs().max() < 1e-6
    loss.sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() < 1e-4 for p in student.parameters.values())


def test_hpt_runs_the_proxy_on_adversarial_images_and_ga_on_clean_ones(
    target: VisionLanguageModel, proxy: VisionLanguageModel
) -> None:
    batch, student = batch_of(4), student_of(target)
    attacked = train_pgd(student.attacked, batch.images, batch.labels, rng_for(batch), eps=EPS, steps=2, alpha=EPS)
    seen = {}
    for anchored in (False, True):
        spy = RecordingTeacher(classifier(proxy))
        HptGpd(anchored=anchored, eps=EPS, alpha=EPS).losses(student, spy, batch, rng_for(batch))
        (seen[anchored],) = spy.seen
    assert torch.equal(seen[False], attacked)
    assert torch.equal(seen[True], batch.images)


def test_the_loss_is_the_same_if_the_classes_of_both_models_are_permuted_but_not_of_one(
    target: VisionLanguageModel, proxy: VisionLanguageModel
) -> None:
    batch = batch_of(4)
    order = [3, 0, 5, 1, 2, 4]
    permuted = tuple(CLASSES[i] for i in order)
    labels = torch.tensor([order.index(y) for y in batch.labels.tolist()])

    def loss(names_target: tuple[str, ...], names_proxy: tuple[str, ...], y: Tensor) -> Tensor:
        student = student_of(target)
        student.classifier = TrainedClassifier(target, names_target, TEMPLATES)
        teacher = TrainedClassifier(proxy, names_proxy, TEMPLATES)
        objective = HptGpd(eps=EPS, alpha=EPS)
        return objective.losses(student, teacher, batch._replace(labels=y), rng_for(batch)).losses["hpt"]

    plain = loss(CLASSES, CLASSES, batch.labels)
    assert torch.allclose(loss(permuted, permuted, labels), plain, atol=1e-5)
    assert not torch.allclose(loss(permuted, CLASSES, labels), plain, atol=1e-3)


def test_metrics_are_the_accuracies_of_both_models_on_adversarial_images(
    target: VisionLanguageModel, proxy: VisionLanguageModel
) -> None:
    batch, student, teacher = batch_of(6), student_of(target), classifier(proxy)
    x = train_pgd(student.attacked, batch.images, batch.labels, rng_for(batch), eps=EPS, steps=2, alpha=EPS)
    terms = HptGpd(eps=EPS, alpha=EPS).losses(student, teacher, batch, rng_for(batch))
    with torch.no_grad():
        right = teacher(x).logits.argmax(1) == batch.labels
        ours = student.attacked(x).argmax(1) == batch.labels
    assert torch.equal(terms.metrics["proxy_accuracy_adversarial"], right.float())
    assert torch.equal(terms.metrics["target_accuracy_adversarial"], ours.float())


# the attack


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_every_iterate_stays_in_the_ball_and_in_the_pixel_range(target: VisionLanguageModel, steps: int) -> None:
    batch, student = batch_of(6), student_of(target)
    images = batch.images.clone()
    x = train_pgd(student.attacked, batch.images, batch.labels, rng_for(batch), eps=EPS, steps=steps, alpha=EPS / 2)
    assert (x - images).abs().max() <= EPS + 1e-7
    assert x.min() >= 0
    assert x.max() <= 1
    assert torch.equal(batch.images, images)
    assert not x.requires_grad


def test_two_steps_are_the_two_steps_of_the_paper(target: VisionLanguageModel) -> None:
    """Compares with the random start and two sign steps with projection, written out."""
    batch, student, alpha = batch_of(3), student_of(target), EPS / 2
    noise = rng_for(batch).uniform(batch.images.shape[1:], -1.0, 1.0)
    x = (batch.images + EPS * noise).clamp(0, 1)
    for _ in range(2):
        x.requires_grad_()
        loss = nn.functional.cross_entropy(student.attacked(x), batch.labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, x)
        moved = x.detach() + alpha * gradient.sign() - batch.images
        x = (batch.images + moved.clamp(-EPS, EPS)).clamp(0, 1)
    found = train_pgd(student.attacked, batch.images, batch.labels, rng_for(batch), eps=EPS, steps=2, alpha=alpha)
    assert torch.allclose(found, x, atol=1e-7)


def test_the_attack_raises_the_targets_loss(target: VisionLanguageModel) -> None:
    batch, student = batch_of(12), student_of(target)
    losses = []
    for steps in (0, 2, 10):
        x = train_pgd(student.attacked, batch.images, batch.labels, rng_for(batch), eps=EPS, steps=steps, alpha=EPS / 4)
        with torch.no_grad():
            losses.append(float(nn.functional.cross_entropy(student.attacked(x), batch.labels)))
    assert losses[0] < losses[1] < losses[2]


def test_the_start_is_a_function_of_seed_and_image_alone(target: VisionLanguageModel) -> None:
    batch, student = batch_of(6), student_of(target)

    def start(rows: list[int], seed: int) -> Tensor:
        rng = ImageRng(seed, [batch.ids[i] for i in rows], "test")
        return train_pgd(student.attacked, batch.images[rows], batch.labels[rows], rng, eps=EPS, steps=0, alpha=EPS)

    assert torch.equal(start([0, 1, 2, 3], 0)[2:], start([2, 3], 0))
    assert not torch.equal(start([0], 0), start([0], 1))


def test_an_attack_leaves_gradients_statistics_and_flags_as_they_were(target: VisionLanguageModel) -> None:
    student, batch = student_of(target, batch_norm="train"), batch_of(4)
    for parameter in student.parameters.values():
        parameter.grad = torch.full_like(parameter, 7.0)
    before = {k: v.clone() for k, v in target.clip.state_dict().items()}
    flags = [m.training for m in target.clip.modules()], [p.requires_grad for p in target.clip.parameters()]
    train_pgd(student.attacked, batch.images, batch.labels, rng_for(batch), eps=EPS, steps=2, alpha=EPS)
    assert all((p.grad == 7.0).all() for p in student.parameters.values())
    assert all(torch.equal(v, before[k]) for k, v in target.clip.state_dict().items())
    assert flags == ([m.training for m in target.clip.modules()], [p.requires_grad for p in target.clip.parameters()])


def test_the_attack_does_not_depend_on_the_proxy(target: VisionLanguageModel, proxy: VisionLanguageModel) -> None:
    batch, student = batch_of(4), student_of(target)
    seen = []
    for _ in range(2):
        spy = RecordingTeacher(classifier(proxy))
        HptGpd(eps=EPS, alpha=EPS).losses(student, spy, batch, rng_for(batch))
        seen.append(spy.seen[0])
        with torch.no_grad():
            for parameter in proxy.clip.parameters():
                parameter.mul_(1.5)
    assert torch.equal(*seen)


def test_an_attack_of_a_negative_number_of_steps_is_refused() -> None:
    with pytest.raises(UserError, match="steps=-1 must be zero or more"):
        HptGpd(steps=-1)
