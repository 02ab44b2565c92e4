"""The memorisation check: whether generated images are closer to training images than unseen images are."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlight.runtime.errors import BadInput

CHUNK = 1024
EQUAL = 1e-5  # largest distance of equal images, relative to the features' standard deviation


class Memorisation(NamedTuple):
    """Distances of images to the training set relative to their distances to the test set.

    A ratio is the distance to the nearest training image over the distance to the nearest test image, in the
    extractor's features. If there are more training than test images, most unseen images have ratios below 1;
    the evidence is how far the ratios of generated images are below those of test images. If there are fewer,
    as for a small client, most unseen images have ratios above 1, and so have outliers such as noise. A copy
    has a ratio below 1 in both cases.

    Attributes:
        generated: ratios of the generated images, finite, 0 or more, shape (n,).
        unseen: ratios of the test images, each compared with the others, without duplicates.
        duplicates: int64, shape (3,): number of test images that are also training images, of further test
            images that repeat another one, and of training images that repeat another one.
    """

    generated: NDArray[np.float64]
    unseen: NDArray[np.float64]
    duplicates: NDArray[np.int64]

    @classmethod
    def joined(cls, checks: Sequence["Memorisation"]) -> "Memorisation":
        """The checks of several models against the same images, as one."""
        return checks[0]._replace(generated=np.concatenate([check.generated for check in checks]))

    def summary(self) -> dict[str, Any]:
        """The medians, the numbers of duplicates, and the share of suspect images.

        An image is suspect if its ratio is below 1 and below the first percentile of the unseen ratios.
        """
        return {
            "ratio": float(np.median(self.generated)),
            "ratio_unseen": float(np.median(self.unseen)),
            "suspect": float((self.generated < min(1.0, np.quantile(self.unseen, 0.01))).mean()),
            "duplicates": dict(
                zip(("test_in_train", "test", "train"), self.duplicates.tolist(), strict=True)
            ),
        }


class CopyCheck:
    """Compares generated images with all training and all test images.

    Test images that are also training images or that repeat another one are left out: they are not unseen,
    and their distances of 0 would make the ratios meaningless.

    Args:
        train, test: features of the images, float32, shape (n, dimension).

    Raises:
        BadInput: fewer than two test images remain.
    """

    def __init__(self, train: Tensor, test: Tensor) -> None:
        self._equal = EQUAL * float(torch.cat([train, test]).double().std(dim=0, correction=0).norm())
        in_train = _nearest(test, train) <= self._equal
        repeats = _repeats(test, self._equal) & ~in_train
        self.train, self.test = train, test[~(in_train | repeats)]
        if len(self.test) < 2:
            raise BadInput(
                "evaluation.memorisation needs at least 2 distinct test images that are not in the training "
                f"set, got {len(self.test)}: set evaluation.memorisation=false, or add test images"
            )
        repeated = len(train) - len(train.unique(dim=0))
        self._duplicates = np.array([int(in_train.sum()), int(repeats.sum()), repeated], np.int64)

    def __call__(self, generated: Tensor) -> Memorisation:
        """Checks generated images, given as features, float32, shape (n, dimension)."""
        ratios = self._ratio(_nearest(generated, self.train), _nearest(generated, self.test))
        return Memorisation(ratios, self._unseen, self._duplicates)

    @cached_property
    def _unseen(self) -> NDArray[np.float64]:
        other = _nearest(self.test, self.test, rank=2)  # rank 1 is the image itself
        return self._ratio(_nearest(self.test, self.train), other)

    def _ratio(self, near: Tensor, far: Tensor) -> NDArray[np.float64]:
        """near / far, with far at least the distance of equal images."""
        ratios: NDArray[np.float64] = (near / far.clamp(min=self._equal)).numpy()
        return ratios


def _distances(queries: Tensor, points: Tensor) -> Iterator[Tensor]:
    """Yields the Euclidean distances of a chunk of queries to all points, float64."""
    exact = points.double()
    for chunk in queries.split(CHUNK):
        yield torch.cdist(chunk.double(), exact, compute_mode="donot_use_mm_for_euclid_dist")


def _nearest(queries: Tensor, points: Tensor, rank: int = 1) -> Tensor:
    """The distance of each query to its nearest point, or to the point of the given rank."""
    return torch.cat([chunk.kthvalue(rank, dim=1).values for chunk in _distances(queries, points)])


def _repeats(images: Tensor, equal: float) -> Tensor:
    """Whether each image equals an earlier one, bool, shape (n,)."""
    first = torch.cat([(chunk <= equal).int().argmax(dim=1) for chunk in _distances(images, images)])
    return first < torch.arange(len(images))
