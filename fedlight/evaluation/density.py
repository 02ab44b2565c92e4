"""Density and coverage of generated images (arXiv 2002.09797), from distances that are computed in chunks."""

from collections.abc import Iterator

import torch
from torch import Tensor

NEIGHBOURS = 5  # k of the paper
CHUNK = 1024  # rows of the matrix of distances that are in memory at once


def neighbour_radii(real: Tensor) -> Tensor:
    """The distance of each real image to its k-th nearest other one, float64, shape (n,).

    Args:
        real: features, float32, shape (n, dimension), n more than k.
    """
    radii = [chunk.kthvalue(NEIGHBOURS + 1, dim=1).values for chunk in _distances(real, real)]
    return torch.cat(radii)  # the nearest point of each image is itself


def density_coverage(generated: Tensor, real: Tensor, radii: Tensor) -> dict[str, float]:
    """Density and coverage (arXiv 2002.09797, equations 3 and 4).

    A real image's ball reaches to its k-th nearest real neighbour, the border included.

    Args:
        generated: features of m images, float32, shape (m, dimension).
        real: features of n images, float32, shape (n, dimension).
        radii: of the real images' balls, as `neighbour_radii` returns them, shape (n,).

    Returns:
        `density`: mean number of balls that a generated image lies in, divided by k; 0 or more, 1 for equal
        distributions.
        `coverage_knn`: share of the balls that hold a generated image, 0..1.
    """
    inside, covered = 0, torch.zeros(len(real), dtype=torch.bool)
    for distances in _distances(generated, real):
        within = distances <= radii
        inside += int(within.sum())
        covered |= within.any(dim=0)
    density = inside / (NEIGHBOURS * len(generated))
    return {"density": density, "coverage_knn": covered.double().mean().item()}


def _distances(queries: Tensor, points: Tensor) -> Iterator[Tensor]:
    """Yields the Euclidean distances of a chunk of queries to all points, float64.

    They come from products of matrices, which is a hundred times faster than differences; in float64 the
    cancellation costs half of the digits.
    """
    exact = points.double()
    for chunk in queries.split(CHUNK):
        yield torch.cdist(chunk.double(), exact, compute_mode="use_mm_for_euclid_dist")
