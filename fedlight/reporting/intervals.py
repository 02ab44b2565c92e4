"""Confidence intervals of means over seeds, and paired differences of methods on equal seeds."""

from collections.abc import Hashable, Mapping, Sequence
from math import sqrt
from statistics import mean, stdev
from typing import NamedTuple, TypeVar

from scipy.special import stdtr, stdtrit

CONFIDENCE = 0.95

Seed = TypeVar("Seed", bound=Hashable)


class Interval(NamedTuple):
    """The mean of a few values, and the bounds between which the mean of all values lies."""

    mean: float
    low: float
    high: float


def t_interval(values: Sequence[float], error: float = 1 - CONFIDENCE) -> Interval | None:
    """The two-sided interval of a mean by Student's t distribution; None for fewer than two values.

    Args:
        values: independent, normally distributed.
        error: probability that the interval misses the mean, 0..1.
    """
    if len(values) < 2:
        return None
    half = stdtrit(len(values) - 1, 1 - error / 2) * stdev(values) / sqrt(len(values))
    return Interval(mean(values), mean(values) - half, mean(values) + half)


class Difference(NamedTuple):
    """A difference between two methods, paired by seed.

    Attributes:
        interval: of the mean difference.
        p: probability of a mean difference as far from zero if the methods were equal, 0..1, of this pair
            alone (two-sided t test).
        pairs: the number of seeds that both methods have.
    """

    interval: Interval
    p: float
    pairs: int

    @property
    def is_level(self) -> bool:
        """Whether the interval holds zero: the seeds do not distinguish the methods."""
        return self.interval.low <= 0 <= self.interval.high


def paired_difference(
    a: Mapping[Seed, float], b: Mapping[Seed, float], comparisons: int = 1
) -> Difference | None:
    """The mean of a − b over the seeds that both have; None for fewer than two such seeds.

    Args:
        a, b: value by seed.
        comparisons: number of differences whose intervals hold together with probability 0.95 or more; each
            is widened for it (Bonferroni).
    """
    differences = [a[seed] - b[seed] for seed in a if seed in b]
    interval = t_interval(differences, (1 - CONFIDENCE) / comparisons)
    if interval is None:
        return None
    spread, pairs = stdev(differences), len(differences)
    if spread == 0:
        return Difference(interval, float(interval.mean == 0), pairs)
    return Difference(interval, 2 * stdtr(pairs - 1, -abs(interval.mean) / (spread / sqrt(pairs))), pairs)
