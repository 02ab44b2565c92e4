"""How well evaluation.bootstrap estimates the deviation of FID, on features whose distribution is known.

python benchmarks/bootstrap.py
"""

from statistics import mean, stdev

import torch
from torch import Tensor

from fedlight.evaluation.bootstrap import bootstrap_entry, fid_standard_error
from fedlight.evaluation.reference import Moments
from fedlight.evaluation.scores import frechet

DIMENSION = 64  # as many features as the classifier has
SETS, DRAWS = 60, 50
MODELS = ((500, 0.2, 1.1), (500, 0.5, 0.9), (500, 0.05, 1.0), (100, 0.2, 1.1))
"""Number of images, shift of the mean in standard deviations, scale."""


def main() -> None:
    """Prints a row for each model as a table in Markdown."""
    torch.set_num_threads(1)
    mixing = torch.randn(
        DIMENSION, DIMENSION, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    mixing *= torch.linspace(2, 0.05, DIMENSION) / DIMENSION**0.5
    covariance = mixing @ mixing.T + 1e-4 * torch.eye(DIMENSION)
    real = Moments(torch.zeros(DIMENSION, dtype=torch.float64), covariance)
    root = torch.linalg.cholesky(covariance)

    def draw(images: int, shift: float, scale: float, seed: int) -> Tensor:
        noise = torch.randn(images, DIMENSION, generator=torch.Generator().manual_seed(seed)).double()
        return scale * noise @ root.T + shift * covariance.diagonal().sqrt()

    print(
        "| images | FID | of many images | deviation | standard error, mean | intervals that cover the mean |"
    )
    print("|---:|---:|---:|---:|---:|---:|")
    for images, shift, scale in MODELS:
        sets = [draw(images, shift, scale, seed) for seed in range(SETS)]
        fids = [frechet(Moments.of(values), real) for values in sets]
        errors = [fid_standard_error(values, real, DRAWS) for values in sets]
        entries = [bootstrap_entry(fid, [error], DRAWS) for fid, error in zip(fids, errors, strict=True)]
        covered = mean(entry["low"] <= mean(fids) <= entry["high"] for entry in entries)
        many = frechet(Moments.of(draw(100_000, shift, scale, SETS)), real)
        numbers = f"{mean(fids):.2f} | {many:.2f} | {stdev(fids):.2f} | {mean(errors):.2f} | {covered:.0%}"
        print(f"| {images} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
