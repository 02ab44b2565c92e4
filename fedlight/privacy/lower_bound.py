"""A lower bound on epsilon from one run with canaries (arXiv 2305.08846)."""

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom

SHARES = (0.05, 0.1, 0.2, 0.5, 1.0)  # of the canaries, that are guessed
MAX_EPSILON = 20.0


def lower_bound(
    included: NDArray[np.float64], left_out: NDArray[np.float64], delta: float, confidence: float = 0.95
) -> float:
    """A lower bound on epsilon that holds with the given confidence.

    Canaries are included or left out at random, each with probability 1/2. The attacker guesses that those
    with the highest scores were included, and that as many with the lowest scores were left out. It is the
    best bound over several numbers of guesses, which divide the error probability equally among them.

    Args:
        included, left_out: scores of canaries that were in the training data and of those that were not.
        delta: of (epsilon, delta).
        confidence: in (0, 1).

    Returns:
        Epsilon in 0..20.
    """
    size = min(len(included), len(left_out))
    scores = np.concatenate((included[:size], left_out[:size]))
    truth = np.arange(2 * size) < size
    ranked = truth[np.lexsort((np.random.default_rng(0).permutation(2 * size), scores))]
    bounds = [0.0]
    for share in SHARES:
        guesses = max(1, round(share * size))
        correct = int(ranked[-guesses:].sum() + (~ranked[:guesses]).sum())
        bounds.append(_refute(2 * size, 2 * guesses, correct, delta, (1 - confidence) / len(SHARES)))
    return max(bounds)


def p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """An upper bound on the probability of so many correct guesses under (epsilon, delta).

    Theorem 3.1 of arXiv 2305.08846.
    """
    accuracy = 1 / (1 + np.exp(-epsilon))
    beta = binom.sf(correct - 1, guesses, accuracy)
    tail = np.cumsum(binom.pmf(correct - np.arange(1, correct + 1), guesses, accuracy))
    alpha = (tail / np.arange(1, correct + 1)).max(initial=0.0)
    return float(min(1.0, beta + 2 * canaries * delta * alpha))


def _refute(canaries: int, guesses: int, correct: int, delta: float, error: float) -> float:
    """The largest epsilon in 0..MAX_EPSILON, to 1e-3, whose p-value is below `error`."""
    low, high = 0.0, MAX_EPSILON
    if p_value(canaries, guesses, correct, low, delta) >= error:
        return 0.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        if p_value(canaries, guesses, correct, middle, delta) < error:
            low = middle
        else:
            high = middle
    return low
