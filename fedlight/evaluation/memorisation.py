"""The memorisation check: do generated images lie nearer to training images than unseen ones do?"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CHUNK = 1024


class Memorisation(NamedTuple):
    """How near images lie to the training set, against how near they lie to the test set.

    A ratio is the distance to the nearest training image over that to the nearest test image, in the
    extractor's features. Training images are more, so even an unseen image's ratio is mostly below 1;
    what counts is how far the generated images' ratios lie below those of the test images.

    Attributes:
        generated: ratios of the generated images, 0 or more, shape (n,).
        unseen: ratios of the test images, each against the other ones, shape (test images,).
    """

    generated: NDArray[np.float64]
    unseen: NDArray[np.float64]

    @classmethod
    def joined(cls, checks: Sequence["Memorisation"]) -> "Memorisation":
        """Several models' checks against the same images, as one."""
        return cls(np.concatenate([check.generated for check in checks]), checks[0].unseen)

    def summary(self) -> dict[str, float]:
        """The medians, and the share of generated ratios below those of 99 % of unseen images."""
        return {
            "ratio": float(np.median(self.generated)),
            "ratio_unseen": float(np.median(self.unseen)),
            "suspect": float((self.generated < np.quantile(self.unseen, 0.01)).mean()),
        }


@dataclass(frozen=True)
class CopyCheck:
    """What generated images are held against: the features of all training and of all test images.

    Attributes:
        train, test: float32, shape (n, dimension); at least two test images.
    """

    train: Tensor
    test: Tensor

    def __call__(self, generated: Tensor) -> Memorisation:
        """Compares the distances of generated images, given as features, float32, shape (n, dimension)."""
        ratios = _ratio(_nearest(generated, self.train), _nearest(generated, self.test))
        return Memorisation(ratios, self._unseen)

    @cached_property
    def _unseen(self) -> NDArray[np.float64]:
        other = _nearest(self.test, self.test, rank=2)  # the nearest is the image itself
        return _ratio(_nearest(self.test, self.train), other)


def _nearest(queries: Tensor, points: Tensor, rank: int = 1) -> Tensor:
    """Euclidean distance of each query to its nearest point, or to the one of the given rank."""
    exact = points.double()
    return torch.cat(
        [
            torch.cdist(chunk.double(), exact, compute_mode="donot_use_mm_for_euclid_dist")
            .kthvalue(rank, dim=1)
            .values
            for chunk in queries.split(CHUNK)
        ]
    )


def _ratio(near: Tensor, far: Tensor) -> NDArray[np.float64]:
    """near / far, where an exact copy in both sets counts as 1."""
    tiny = torch.finfo(torch.float64).tiny
    return ((near + tiny) / (far + tiny)).numpy()
