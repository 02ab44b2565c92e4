"""Intervals over seeds and paired differences, against scipy and by simulation."""

import numpy as np
import pytest
from scipy import stats
from scored import make_comparison

from fedlight.reporting.comparison import Comparison
from fedlight.reporting.difference_table import differences
from fedlight.reporting.intervals import paired_difference, t_interval

SEEDS = (2, 3, 5, 12)
DRAWS = 1000
FEW = stats.binom(DRAWS, 0.05).ppf([0.001, 0.999])  # how often 5 % may happen in 1,000 draws


@pytest.mark.parametrize("n", SEEDS)
def test_the_interval_of_a_mean_is_that_of_scipy(n: int) -> None:
    values = np.random.default_rng(n).normal(9, 2, n).tolist()
    interval = t_interval(values)
    assert interval is not None
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert interval == pytest.approx((np.mean(values), *expected))


@pytest.mark.parametrize("n", SEEDS)
@pytest.mark.parametrize("comparisons", [1, 6])
def test_a_paired_difference_is_that_of_scipy(n: int, comparisons: int) -> None:
    a, b = np.random.default_rng(n).normal([[9], [10]], 2, (2, n)).tolist()
    difference = paired_difference(dict(enumerate(a)), dict(enumerate(b)), comparisons)
    assert difference is not None
    test = stats.ttest_rel(a, b)
    expected = test.confidence_interval(1 - 0.05 / comparisons)
    assert difference.interval == pytest.approx((np.mean(a) - np.mean(b), *expected))
    assert (difference.p, difference.pairs) == (pytest.approx(test.pvalue), n)
    assert difference.is_level == (test.pvalue >= 0.05 / comparisons)


def test_only_seeds_that_both_methods_have_are_compared() -> None:
    difference = paired_difference({1: 10.0, 2: 12.0, 3: 99.0}, {1: 9.0, 2: 10.0, 4: 0.0})
    assert difference is not None
    assert (difference.interval.mean, difference.pairs) == (1.5, 2)
    assert paired_difference({1: 10.0, 3: 99.0}, {1: 9.0, 4: 0.0}) is None
    assert t_interval([3.0]) is None


def test_seeds_without_any_spread_are_compared_by_their_mean() -> None:
    for distance, level in ((0.0, True), (1.0, False)):
        difference = paired_difference({1: 5 + distance, 2: 6 + distance}, {1: 5.0, 2: 6.0})
        assert difference is not None
        assert difference.is_level == level
        assert difference.p == float(level)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_two_equal_methods_are_called_different_in_five_percent_of_draws(seeds: int) -> None:
    marks = sum(called_different(draw(seed, [2.0, 2.0], seeds)) for seed in range(DRAWS))
    assert FEW[0] <= marks <= FEW[1]


@pytest.mark.parametrize("deviations", [[1.0] * 4, [0.2, 0.5, 1.0, 2.0], [1.0] * 8])
def test_of_many_equal_methods_any_is_called_different_in_five_percent_of_draws_at_most(
    deviations: list[float],
) -> None:
    marks = sum(called_different(draw(seed, deviations, 3)) for seed in range(DRAWS))
    assert marks <= FEW[1]


def test_methods_that_differ_by_more_than_their_spread_are_told_apart() -> None:
    marked = sum(bool(draw(seed, [0.1, 0.1], 3, 1.0).best(PLACE)) for seed in range(100))
    assert marked > 95


def test_the_table_of_differences_prints_its_numbers() -> None:
    comparison = make_comparison({"UDEC": [12.5, 14.0, 13.0], "FULL": [10.0, 12.0, 11.0]})
    table = differences(comparison, "")
    assert table
    printed = dict(zip(table.columns, [field.text for field in table.rows[0]], strict=True))
    test = stats.ttest_rel([12.5, 14.0, 13.0], [10.0, 12.0, 11.0])
    low, high = test.confidence_interval()
    assert printed == {
        "partition": "iid",
        "clients": "2",
        "lower FID": "FULL",
        "higher FID": "UDEC",
        "difference": "+2.17",
        "interval": f"[{low:.2f}, {high:.2f}]",
        "relative": "+20 %",
        "p": f"{test.pvalue:.2g}",
        "seeds": "3",
        "verdict": "different",
    }
    assert table.data[0]["p"] == pytest.approx(test.pvalue)
    assert differences(make_comparison({"FULL": [1.0], "UDEC": [2.0]}), "") is None


def draw(seed: int, deviations: list[float], seeds: int, distance: float = 0.0) -> Comparison:
    """Methods whose FIDs are drawn around a common one, which depends on the seed as on a partition."""
    chance = np.random.default_rng(seed)
    common = chance.normal(20, 3, seeds)
    values = [chance.normal(common + distance * i, sd) for i, sd in enumerate(deviations)]
    return make_comparison({f"M{i}": fids.tolist() for i, fids in enumerate(values)})


def called_different(comparison: Comparison) -> bool:
    """Whether the page says of any two methods that they differ: by a mark, or in its table."""
    table = differences(comparison, "")
    assert table
    differs = any(line["verdict"] == "different" for line in table.data)
    assert differs or not comparison.best(PLACE)
    return differs


PLACE = make_comparison({"FULL": [1.0]}).places[0]
