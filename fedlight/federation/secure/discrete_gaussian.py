"""The discrete Gaussian distribution (arXiv 2004.00010), the noise of integers."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Uniform(Protocol):
    """Draws uniform numbers; NumPy's Generator and `SystemGenerator` have this interface."""

    def random(self, size: int) -> NDArray[np.float64]:
        """Independent numbers in (0, 1), of the given shape."""


def draw_discrete_gaussian(deviation: float, count: int, uniform: Uniform) -> NDArray[np.int64]:
    """Independent integers x with probability proportional to exp(-x^2 / (2 deviation^2)).

    Draws from the discrete Laplace distribution of scale t = floor(deviation) + 1 and accepts x with
    probability exp(-(|x| - deviation^2 / t)^2 / (2 deviation^2)) (algorithm 3). Unlike the paper's it
    computes in float64, so that each probability has a relative error of about 2^-52.

    Args:
        deviation: above 0, at most 2^40.
        count: of the integers.
        uniform: the only source of randomness; a draw takes about five numbers.
    """
    scale = np.floor(deviation) + 1
    drawn = np.zeros(count, np.int64)
    missing = np.arange(count)
    while len(missing):
        signs = np.where(uniform.random(len(missing)) < 0.5, -1, 1)
        magnitudes = np.floor(-scale * np.log(1 - uniform.random(len(missing)))).astype(np.int64)
        log_ratio = -((magnitudes - deviation**2 / scale) ** 2) / (2 * deviation**2)
        accepted = np.log(1 - uniform.random(len(missing))) <= log_ratio
        accepted &= (magnitudes > 0) | (signs > 0)  # zero has one sign
        drawn[missing[accepted]] = (signs * magnitudes)[accepted]
        missing = missing[~accepted]
    return drawn
