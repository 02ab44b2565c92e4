"""Density and coverage: against a loop over images, and in cases whose answer is known."""

import math

import pytest
import torch
from torch import Tensor

from fedlight.evaluation import density
from fedlight.evaluation.density import NEIGHBOURS, density_coverage, neighbour_radii


def cloud(images: int, seed: int, dimension: int = 6) -> Tensor:
    return torch.randn(images, dimension, generator=torch.Generator().manual_seed(seed))


def by_loops(generated: Tensor, real: Tensor) -> tuple[float, float]:
    """The definitions of arXiv 2002.09797, one pair of images after the other."""
    radii = []
    for i, image in enumerate(real.tolist()):
        others = sorted(math.dist(image, other) for j, other in enumerate(real.tolist()) if j != i)
        radii.append(others[NEIGHBOURS - 1])
    inside = [
        [math.dist(image, centre) <= radius for centre, radius in zip(real.tolist(), radii, strict=True)]
        for image in generated.tolist()
    ]
    balls = sum(map(sum, inside)) / (NEIGHBOURS * len(generated))
    covered = sum(any(row[i] for row in inside) for i in range(len(real))) / len(real)
    return balls, covered


@pytest.mark.parametrize(("images", "shift", "spread"), [(40, 0.0, 1.0), (70, 1.0, 1.0), (25, 0.0, 0.2)])
@pytest.mark.parametrize("chunk", [7, 1024])
def test_they_are_those_of_a_loop_whatever_the_size_of_a_chunk(
    monkeypatch: pytest.MonkeyPatch, images: int, shift: float, spread: float, chunk: int
) -> None:
    monkeypatch.setattr(density, "CHUNK", chunk)
    generated, real = spread * cloud(images, 1) + shift, cloud(53, 2)
    measured = density_coverage(generated, real, neighbour_radii(real))
    assert (measured["density"], measured["coverage_knn"]) == pytest.approx(by_loops(generated, real))
    assert 0 < measured["coverage_knn"] < 1


def test_images_of_the_real_distribution_have_density_one_and_cover_it() -> None:
    generated, real = cloud(2000, 1), cloud(2000, 2)
    measured = density_coverage(generated, real, neighbour_radii(real))
    assert measured["density"] == pytest.approx(1, abs=0.05)
    assert measured["coverage_knn"] == pytest.approx(1 - 2**-NEIGHBOURS, abs=0.02)  # the paper, lemma 2


def test_one_image_again_and_again_may_be_dense_and_covers_little() -> None:
    real = cloud(500, 2)
    same = torch.zeros(500, 6)  # the centre of the cloud
    measured = density_coverage(same, real, neighbour_radii(real))
    assert measured["density"] > 1
    assert measured["coverage_knn"] < 0.25


def test_distances_of_features_far_from_the_origin_are_exact_enough() -> None:
    """A product of matrices cancels; in float64 the neighbours stay the right ones."""
    generated, real = cloud(40, 1) + 300, cloud(53, 2) + 300
    measured = density_coverage(generated, real, neighbour_radii(real))
    assert (measured["density"], measured["coverage_knn"]) == pytest.approx(by_loops(generated, real))
