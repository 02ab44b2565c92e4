"""A lower bound on epsilon from one run with canaries (arXiv 2305.08846)."""

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom

SHARES = (0.05, 0.1, 0.2, 0.5, 1.0)  # of the canaries that are guessed
LARGEST = 20.0


def lower_bound(
    included: NDArray[np.float64], left_out: NDArray[np.float64], delta: float, confidence: float = 0.95
) -> float:
    """The largest epsilon that the guesses refute: with the given confidence the true one is no smaller.

    Canaries are included or left out at random, each with probability 1/2. Those of the highest scores are
    guessed included, as many of the lowest ones left out. How many guesses to make is tried in a few ways,
    each with its part of the error.

    Args:
        included, left_out: scores of canaries that were in the training data and of those that were not.
        delta: of (epsilon, delta).
        confidence: in (0, 1).

    Returns:
        Epsilon in 0..20.
    """
    many = min(len(included), len(left_out))
    scores = np.concatenate((included[:many], left_out[:many]))
    truth = np.arange(2 * many) < many
    ranked = truth[np.lexsort((np.random.default_rng(0).permutation(2 * many), scores))]
    found = [0.0]
    for share in SHARES:
        each = max(1, round(share * many))
        correct = int(ranked[-each:].sum() + (~ranked[:each]).sum())
        found.append(_refuted(2 * many, 2 * each, correct, delta, (1 - confidence) / len(SHARES)))
    return max(found)


def p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """How probable so many correct guesses are at most under (epsilon, delta) (theorem 3.1 there)."""
    right = 1 / (1 + np.exp(-epsilon))
    beta = binom.sf(correct - 1, guesses, right)
    tail = np.cumsum(binom.pmf(correct - np.arange(1, correct + 1), guesses, right))
    alpha = (tail / np.arange(1, correct + 1)).max(initial=0.0)
    return float(min(1.0, beta + 2 * canaries * delta * alpha))


def _refuted(canaries: int, guesses: int, correct: int, delta: float, error: float) -> float:
    low, high = 0.0, LARGEST
    if p_value(canaries, guesses, correct, low, delta) >= error:
        return 0.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        if p_value(canaries, guesses, correct, middle, delta) < error:
            low = middle
        else:
            high = middle
    return low
