import pytest

from vlmdefend.evaluation.statistics.intervals import mean_and_spread, wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (0, 10, 0.0, 0.277533),
        (10, 10, 0.722467, 1.0),
        (5, 10, 0.236593, 0.763407),
        (1, 1, 0.206549, 1.0),
        (81, 263, 0.2553, 0.3662),  # this and the next three: Newcombe 1998, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_equals_the_published_values(successes: int, n: int, low: float, high: float) -> None:
    assert wilson(successes, n) == pytest.approx((low, high), abs=1e-4)


def test_wilson_interval_stays_in_0_to_1_and_holds_the_proportion() -> None:
    for n in (1, 2, 3, 7, 50, 1000):
        for k in range(0, n + 1, max(1, n // 7)):
            low, high = wilson(k, n)
            assert 0.0 <= low <= k / n <= high <= 1.0


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_what_is_no_proportion(successes: int, n: int) -> None:
    with pytest.raises(ValueError):
        wilson(successes, n)


def test_spread_is_the_sample_standard_deviation_and_absent_for_one_value() -> None:
    assert mean_and_spread([0.4]) == (0.4, None)
    mean, spread = mean_and_spread([0.40, 0.44, 0.48])
    assert mean == pytest.approx(0.44)
    assert spread == pytest.approx(0.04)
