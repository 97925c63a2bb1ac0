"""The learning rate, at the values that the published schedule has."""

from __future__ import annotations

import pytest

from vlmdefend.training.loop.schedule import learning_rate, warm_up_steps

PUBLISHED = [
    (0, 7815, 1e-3),
    (499, 7815, 0.5),
    (999, 7815, 1.0),
    (1000, 7815, 1.0),
    (7814, 7815, 5.3e-8),
    (15629, 15630, 1.15e-8),
]


@pytest.mark.parametrize(("step", "steps", "expected"), PUBLISHED)
def test_published_values_at_batch_64_on_tiny_imagenet(step: int, steps: int, expected: float) -> None:
    assert learning_rate(step, steps, 1.0, 1000) == pytest.approx(expected, rel=5e-3)


def test_a_run_shorter_than_the_published_warm_up_never_reaches_its_rate() -> None:
    assert max(learning_rate(s, 200, 1.0, 1000) for s in range(200)) == pytest.approx(0.2)


def test_the_warm_up_is_scaled_so_that_short_runs_reach_it() -> None:
    assert warm_up_steps(15630) == 1000
    assert warm_up_steps(200) == 20
    assert max(learning_rate(s, 200, 1.0, warm_up_steps(200)) for s in range(200)) == 1.0
    assert warm_up_steps(3) == 0
    assert learning_rate(0, 3, 1.0, 0) == 1.0


def test_the_rate_rises_then_falls_and_ends_near_zero() -> None:
    rates = [learning_rate(s, 100, 2.0, 10) for s in range(100)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 0.001
