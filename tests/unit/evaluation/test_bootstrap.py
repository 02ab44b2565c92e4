"""The bootstrap of FID, against the deviation over many draws from a distribution that is known."""

from statistics import mean, stdev

import pytest
import torch
from torch import Tensor

from fedlight.evaluation.bootstrap import bootstrap_entry, fid_standard_error
from fedlight.evaluation.reference import Moments
from fedlight.evaluation.scores import frechet

DIMENSION, IMAGES = 8, 100
REAL = Moments(torch.zeros(DIMENSION, dtype=torch.float64), torch.eye(DIMENSION, dtype=torch.float64))
SETS = 60


def generated(seed: int) -> Tensor:
    """Features of images of a model that is off in mean and scale."""
    noise = torch.randn(IMAGES, DIMENSION, generator=torch.Generator().manual_seed(seed))
    return 1.3 * noise + 0.2


def test_the_interval_covers_the_mean_fid_of_other_images_of_the_model() -> None:
    fids = [frechet(Moments.of(generated(seed)), REAL) for seed in range(SETS)]
    errors = [fid_standard_error(generated(seed), REAL, 50) for seed in range(SETS)]
    assert 0.9 < mean(errors) / stdev(fids) < 1.5  # rather too large
    intervals = [bootstrap_entry(fid, [error], 50) for fid, error in zip(fids, errors, strict=True)]
    covered = mean(interval["low"] <= mean(fids) <= interval["high"] for interval in intervals)
    assert covered > 0.88


def test_the_same_images_have_the_same_error() -> None:
    assert fid_standard_error(generated(1), REAL, 5) == fid_standard_error(generated(1), REAL, 5)


def test_errors_of_independent_models_add_by_their_squares() -> None:
    entry = bootstrap_entry(10.0, [0.3, 0.4], 50)
    assert entry["standard_error"] == pytest.approx(0.25)  # 0.5 / 2
    assert (entry["low"], entry["high"]) == pytest.approx((10 - 0.49, 10 + 0.49), abs=1e-3)
    assert entry["draws"] == 50
