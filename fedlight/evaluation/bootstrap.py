"""The bootstrap of FID: how far the score of one model varies with the images that are drawn from it."""

from math import sqrt

import numpy as np
import torch
from scipy.special import ndtri
from torch import Tensor

from fedlight.evaluation.reference import Moments
from fedlight.evaluation.scores import frechet

CONFIDENCE = 0.95


def fid_standard_error(values: Tensor, real: Moments, draws: int) -> float:
    """The standard deviation of the FID over resampled images; the real images stay the same.

    The mean over the resamples is not used: FID is biased upwards by the finite number of images (arXiv
    1911.07023), and a resample, which repeats images, is biased once more. Its quantiles would therefore miss
    the FID itself. The deviation is rather too large, by up to a factor of two where the images barely
    outnumber the features or the FID is mostly bias.

    Args:
        values: features of the generated images, shape (n, dimension).
        real: moments of the real images.
        draws: number of resamples, 2 or more, each of n images; their random numbers have a fixed seed.
    """
    chance = np.random.default_rng(0)
    fids = [
        frechet(Moments.of(values[torch.from_numpy(chance.integers(len(values), size=len(values)))]), real)
        for _ in range(draws)
    ]
    return float(np.std(fids, ddof=1))


def bootstrap_entry(value: float, standard_errors: list[float], draws: int) -> dict[str, float]:
    """The entry `bootstrap` of the scores: a 95 % interval of the FID that other images would give.

    Args:
        value: the FID, a mean over models.
        standard_errors: of the FID of each model; their images are independent.
        draws: number of resamples.
    """
    error = sqrt(sum(se**2 for se in standard_errors)) / len(standard_errors)
    half = float(ndtri(0.5 + CONFIDENCE / 2)) * error
    return {"draws": draws, "standard_error": error, "low": value - half, "high": value + half}
