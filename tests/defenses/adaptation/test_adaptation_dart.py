"""DART's loss against the golden vectors of the released code, and the laws that follow from its form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, tensor

from vlmdefend.defenses.adaptation import ADAPTATIONS
from vlmdefend.defenses.adaptation.dart_urda import (
    INSIDE_LOG,
    DartUrda,
    certainty,
    dart_terms,
    divergences,
    feature_loss,
)
from vlmdefend.errors import UserError
from vlmdefend.training.loop.schedule import Decay
from vlmdefend.types import Outputs

TEACHER = tensor([[2.0, 1, 0, -1], [0, 0, 0, 0], [5, -1, -1, -1]])
CLEAN = tensor([[1.0, 1, 0, 0], [1, 0, 0, -1], [3, 0, 0, 0]])
ADVERSARIAL = tensor([[0.0, 2, 0, 0], [0, 1, 0, 0], [1, 1, 1, 0]])
FEATURES, TEACHER_FEATURES = tensor([[0.0, 1], [1, 1], [2, 0]]), tensor([[0.0, 0], [1, 0], [2, 1]])
GOLDEN = {  # reduction: prediction, defense, total
    "released": (0.1265771, 0.4363475, 0.5562925),
    "mean": (0.0632038, 0.2723055, 0.5335509),
    "sum": (0.1896115, 0.8169164, 0.5 + 0.1 * (0.1896115 + 0.8169164)),
}


def terms(reduction: str = "released", times: int = 1):
    given, own = (
        Outputs(z.repeat(times, 1), f.repeat(times, 1)) for z, f in ((TEACHER, TEACHER_FEATURES), (CLEAN, FEATURES))
    )
    return dart_terms(given, own, ADVERSARIAL.repeat(times, 1), reduction=reduction)


def close(found: Tensor, expected: object) -> None:
    assert torch.allclose(found, torch.as_tensor(expected), atol=1e-5)


@pytest.mark.parametrize("reduction", sorted(GOLDEN))
def test_the_golden_vectors_of_all_three_reductions(reduction: str) -> None:
    prediction, defense, total = GOLDEN[reduction]
    found = terms(reduction)
    close(found.prediction, prediction)
    close(found.defense, defense)
    close(found.features, 0.5)
    close(found.total, total)


def test_the_golden_weights_and_divergences() -> None:
    close(certainty(TEACHER), [0.3165254, 2.8908e-5, 0.9627374])
    close(divergences(TEACHER, CLEAN, 2.0), [0.0566445, 0.0618596, 0.1783252])
    close(divergences(TEACHER, ADVERSARIAL, 2.0), [0.2226136, 0.0252979, 0.7753441])


def test_a_sure_teacher_weighs_one_and_an_even_one_next_to_nothing() -> None:
    sure, even = certainty(tensor([[200.0, 0, 0, 0], [0, 0, 0, 0]]))
    assert float(sure) == 1.0  # the release has 1 - log(1 + 1e-5) / log 4 > 1
    assert 1 + math.log(1 + INSIDE_LOG) / math.log(4) == pytest.approx(1.0000072, abs=1e-7)
    close(even, 2.89e-5)


def test_a_batch_twice_as_large_doubles_the_released_and_the_sum_but_not_the_mean() -> None:
    for reduction, factor in (("released", 2.0), ("sum", 2.0), ("mean", 1.0)):
        once, twice = terms(reduction), terms(reduction, times=2)
        close(twice.defense, factor * once.defense)
        close(twice.prediction, factor * once.prediction)
        close(twice.features, once.features)


def test_of_a_teacher_that_knows_nothing_only_the_features_are_learnt() -> None:
    nothing = Outputs(torch.zeros(3, 4), TEACHER_FEATURES)
    for reduction in ("released", "sum", "mean"):
        found = dart_terms(nothing, Outputs(CLEAN, FEATURES), ADVERSARIAL, reduction=reduction)
        assert float(found.defense) < 1e-4
        assert float(found.prediction) < 1e-4
        close(found.total, 0.5)


def test_no_gradient_reaches_a_student_that_equals_its_teacher() -> None:
    logits, features = TEACHER.clone().requires_grad_(True), TEACHER_FEATURES.clone().requires_grad_(True)
    found = dart_terms(Outputs(TEACHER, TEACHER_FEATURES), Outputs(logits, features), logits)
    found.total.backward()
    close(found.total.detach(), 0.0)
    close(logits.grad, torch.zeros(3, 4))


@pytest.mark.parametrize(("step", "rate"), [(0, 5.0e-3), (500, 3.689e-3), (5000, 1.304e-3), (10_000, 8.278e-4)])
def test_the_rate_falls_as_the_release_lets_it(step: int, rate: float) -> None:
    assert 0.005 * Decay().factor(step) == pytest.approx(rate, rel=2e-4)


def test_features_of_another_width_are_refused_with_the_way_out() -> None:
    with pytest.raises(UserError, match=r"has 3 features.*--bottleneck"):
        feature_loss(Outputs(CLEAN, FEATURES), Outputs(TEACHER, torch.zeros(3, 3)))
    with pytest.raises(UserError, match=r"gives no features.*--ablate features"):
        feature_loss(Outputs(CLEAN, FEATURES), Outputs(TEACHER))


def test_without_any_term_there_is_nothing_to_learn() -> None:
    with pytest.raises(UserError, match="all three terms"):
        DartUrda(defense=False, prediction=False, features=False)


def test_the_cost_is_ten_steps_and_two_student_forwards_and_one_of_the_teacher() -> None:
    cost = ADAPTATIONS.create("dart-urda").cost
    assert (cost.forward_backwards, cost.teacher_forwards) == (12, 1)
