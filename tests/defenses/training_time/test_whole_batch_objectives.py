"""Training-time objectives in which the images of a batch meet, against values worked out by hand."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import exp, log
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.defenses.training_time.test_training_time import check, terms
from vlmdefend.defenses.training_time import OBJECTIVES
from vlmdefend.defenses.training_time.adv_lora import DELTA, step_size
from vlmdefend.defenses.training_time.at import contrast
from vlmdefend.defenses.training_time.base import Terms
from vlmdefend.rng import ImageRng
from vlmdefend.types import Batch, Outputs

LN3 = log(3)

# at


def test_ft_adv_is_half_of_image_to_prompt_and_half_of_prompt_to_image_among_the_prompts_of_the_batch() -> None:
    """Of the probabilities (1/4, 1/2), (1/8, 3/4) of the two classes of the batch: by rows, and by columns."""
    found = terms("at")
    first = (log((1 / 4 + 1 / 2) / (1 / 4)) + log((1 / 4 + 1 / 8) / (1 / 4))) / 2
    second = (log((1 / 8 + 3 / 4) / (3 / 4)) + log((1 / 2 + 3 / 4) / (3 / 4))) / 2
    check(found.losses["contrast"], first, second)
    check(found.metrics["accuracy_adversarial"], 0.0, 1.0)


def test_ft_clean_sees_the_clean_images_and_attacks_nothing() -> None:
    found = terms("at", images="clean", steps=2)
    check(found.losses["contrast"], log(3 / 2), log(3 / 2))
    assert list(found.metrics) == ["accuracy_clean"]
    assert OBJECTIVES.create("at:images=clean").cost.forward_backwards == 1


@pytest.mark.parametrize(
    ("masked", "expected"),
    [
        # images 0 and 1 are of class 1, image 2 is of class 0; probabilities of (0, 1): (1/2, 1/2), (1/4, 3/4), (1, 1)
        (False, ((3 / 2) / (1 / 2), (9 / 4) / (1 / 2), (7 / 4) / (3 / 4), (9 / 4) / (3 / 4), 3.0, (7 / 4) / 1)),
        (True, (1 / (1 / 2), (3 / 2) / (1 / 2), 1 / (3 / 4), (7 / 4) / (3 / 4), 3.0, (7 / 4) / 1)),
    ],
)
def test_two_images_of_one_class_are_a_wrong_pair_unless_that_is_masked(masked: bool, expected: Any) -> None:
    logits = torch.tensor([[0.5, 0.5], [0.25, 0.75], [1.0, 1.0]]).log()
    by_image, by_prompt = expected[::2], expected[1::2]
    halves = [(log(a) + log(b)) / 2 for a, b in zip(by_image, by_prompt, strict=True)]
    check(contrast(logits, torch.tensor([1, 1, 0]), masked=masked), *halves)


# adv-lora


@dataclass
class Pixels:
    """A model whose logits are the three values of an image of one pixel."""

    iteration: int = 0
    carried: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, images: Tensor) -> Outputs:
        return Outputs(self.attacked(images), None)

    def attacked(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def lora_terms(student: Pixels, **options: Any) -> Terms:
    batch = Batch(["one", "two"], torch.full((2, 3, 1, 1), 0.5), torch.tensor([0, 1]))
    objective = OBJECTIVES.create("adv-lora", **({"eps": 0.25, "steps": 1} | options))
    return objective.losses(student, None, batch, ImageRng(0, batch.ids, "test"))  # type: ignore[arg-type]


def gradient_at(delta: list[float]) -> list[float]:
    """Of the mean cross-entropy: the softmax less the mean of the labels (1, 0, 0) and (0, 1, 0)."""
    total = sum(map(exp, delta))
    return [exp(d) / total - share for d, share in zip(delta, (0.5, 0.5, 0.0), strict=True)]


def test_adv_loras_perturbation_goes_up_the_mean_gradient_of_all_images_and_is_carried_on() -> None:
    student = Pixels(iteration=300)
    found = lora_terms(student).losses["cross_entropy"]
    first = [0.05 * (1 / 3 - 1 / 2), 0.05 * (1 / 3 - 1 / 2), 0.05 / 3]
    check(student.carried[DELTA].flatten(), *first)
    check(found, *[log(sum(map(exp, first))) - first[label] for label in (0, 1)])
    lora_terms(student)
    second = [d + 0.05 * g for d, g in zip(first, gradient_at(first), strict=True)]
    check(student.carried[DELTA].flatten(), *second)
    assert lora_terms(Pixels(iteration=300), steps=2).losses["cross_entropy"].tolist() == pytest.approx(
        [log(sum(map(exp, second))) - second[label] for label in (0, 1)], abs=1e-6
    )


def test_its_first_step_of_a_run_leads_to_the_corner_of_the_box() -> None:
    student = Pixels(iteration=0)
    lora_terms(student)
    assert student.carried[DELTA].flatten().tolist() == [-0.25, -0.25, 0.25]


def test_its_step_size_goes_from_one_over_the_length_to_one() -> None:
    assert step_size(2.0, 0) == pytest.approx(0.5 + 0.5 / 300)
    assert step_size(2.0, 298) == pytest.approx(0.5 + 0.5 / 2)
    assert step_size(2.0, 299) == step_size(2.0, 300) == step_size(0.0, 1000) == 1.0


def test_per_image_is_an_attack_on_each_image_and_carries_nothing() -> None:
    student = Pixels()
    found = lora_terms(student, perturbation="per-image", steps=8, alpha=0.25).losses["cross_entropy"]
    lost = log(exp(-0.25) + 2 * exp(0.25)) + 0.25  # the true class down by 1/4, the others up by 1/4
    check(found, lost, lost)
    assert not student.carried
    assert not OBJECTIVES.create("adv-lora:perturbation=per-image").whole_batch


def test_a_perturbed_image_stays_an_image() -> None:
    student = Pixels(carried={DELTA: torch.full((3, 1, 1), 0.75)})
    found = lora_terms(student, steps=0, eps=1.0).losses["cross_entropy"]
    check(found, LN3, LN3)  # 0.5 + 0.75 is 1 in all three


def test_lora_dropout_and_rank_are_what_the_authors_have() -> None:
    schedule = OBJECTIVES.get("adv-lora").schedule
    assert schedule is not None
    assert (schedule.optimizer, schedule.rate, schedule.weight_decay, schedule.batch_size) == ("adamw", 2e-4, 1e-2, 32)
    assert (schedule.trains, schedule.epochs * 16_000 // 32) == ("lora-all:2:0.25", 500 * 16)
