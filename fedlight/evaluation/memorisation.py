"""The memorisation check: do generated images lie nearer to training images than unseen ones do?"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlight.runtime.errors import BadInput

CHUNK = 1024
EQUAL = 1e-5  # distance of what counts as one image, as a share of the features' standard deviation


class Memorisation(NamedTuple):
    """How near images lie to the training set, against how near they lie to the test set.

    A ratio is the distance to the nearest training image over that to the nearest test image, in the
    extractor's features. Where training images are more, even an unseen image's ratio is mostly below 1;
    what counts is how far the generated images' ratios lie below those of the test images. Where they are
    few, as a small client's are, an unseen image's is mostly above 1, and so is that of an image far from
    all others, such as noise; a copy's is below 1 all the same.

    Attributes:
        generated: ratios of the generated images, finite, 0 or more, shape (n,).
        unseen: ratios of the test images, each against the other ones, without duplicates.
        duplicates: int64, shape (3,): test images that are training images too; further test images that
            repeat another one; training images that repeat another one.
    """

    generated: NDArray[np.float64]
    unseen: NDArray[np.float64]
    duplicates: NDArray[np.int64]

    @classmethod
    def joined(cls, checks: Sequence["Memorisation"]) -> "Memorisation":
        """Several models' checks against the same images, as one."""
        return checks[0]._replace(generated=np.concatenate([check.generated for check in checks]))

    def summary(self) -> dict[str, Any]:
        """The medians, the share of generated ratios below 1 and 99 % of the unseen ones, the duplicates."""
        return {
            "ratio": float(np.median(self.generated)),
            "ratio_unseen": float(np.median(self.unseen)),
            "suspect": float((self.generated < min(1.0, np.quantile(self.unseen, 0.01))).mean()),
            "duplicates": dict(
                zip(("test_in_train", "test", "train"), self.duplicates.tolist(), strict=True)
            ),
        }


class CopyCheck:
    """What generated images are held against: the features of all training and of all test images.

    Test images that are training images too, or that repeat another one, are left out: they are no unseen
    images, and their distances of 0 would make the ratios meaningless.

    Args:
        train, test: float32, shape (n, dimension).

    Raises:
        BadInput: fewer than two test images are left.
    """

    def __init__(self, train: Tensor, test: Tensor) -> None:
        self._equal = EQUAL * float(torch.cat([train, test]).double().std(dim=0, correction=0).norm())
        in_train = _nearest(test, train) <= self._equal
        repeats = _repeats(test, self._equal) & ~in_train
        self.train, self.test = train, test[~(in_train | repeats)]
        if len(self.test) < 2:
            raise BadInput(
                "evaluation.memorisation compares with test images that are not in the training set and "
                f"differ, and there are only {len(self.test)} of them"
            )
        repeated = len(train) - len(train.unique(dim=0))
        self._duplicates = np.array([int(in_train.sum()), int(repeats.sum()), repeated], np.int64)

    def __call__(self, generated: Tensor) -> Memorisation:
        """Compares the distances of generated images, given as features, float32, shape (n, dimension)."""
        ratios = self._ratio(_nearest(generated, self.train), _nearest(generated, self.test))
        return Memorisation(ratios, self._unseen, self._duplicates)

    @cached_property
    def _unseen(self) -> NDArray[np.float64]:
        other = _nearest(self.test, self.test, rank=2)  # the nearest is the image itself
        return self._ratio(_nearest(self.test, self.train), other)

    def _ratio(self, near: Tensor, far: Tensor) -> NDArray[np.float64]:
        """near / far, where an exact copy of a test image is as far from it as equal images may lie."""
        ratios: NDArray[np.float64] = (near / far.clamp(min=self._equal)).numpy()
        return ratios


def _distances(queries: Tensor, points: Tensor) -> Iterator[Tensor]:
    """Euclidean distances, float64, of some queries at a time to all points."""
    exact = points.double()
    for chunk in queries.split(CHUNK):
        yield torch.cdist(chunk.double(), exact, compute_mode="donot_use_mm_for_euclid_dist")


def _nearest(queries: Tensor, points: Tensor, rank: int = 1) -> Tensor:
    """Distance of each query to its nearest point, or to the one of the given rank."""
    return torch.cat([found.kthvalue(rank, dim=1).values for found in _distances(queries, points)])


def _repeats(images: Tensor, equal: float) -> Tensor:
    """Which images equal one before them, bool, shape (n,)."""
    first = torch.cat([(found <= equal).int().argmax(dim=1) for found in _distances(images, images)])
    return first < torch.arange(len(images))
