"""Fixed-point numbers: real values as integers, whose sum modulo 2^m is exact in any order."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedlight.runtime.errors import Damaged

LARGEST_LOSS = 16.0  # a larger mean loss of a client counts as this


@dataclass(frozen=True)
class FixedPoint:
    """Clips values to [-clip, clip] and rounds them at random to one of 2 L + 1 levels, L = 2^(bits-1) - 1.

    The expected value of a rounded number is the clipped number; the error is below clip / L.

    Attributes:
        clip: largest magnitude of a value, above 0.
        bits: of a rounded value, 2 to 32.
        modulus_bits: m; a multiple of 8, 16 to 64.
    """

    clip: float
    bits: int
    modulus_bits: int

    @property
    def levels(self) -> int:
        """L, the largest rounded value."""
        return 2 ** (self.bits - 1) - 1

    @property
    def scale(self) -> float:
        """Levels per unit of a value."""
        return self.levels / self.clip

    @property
    def largest_sum(self) -> int:
        """The largest magnitude of a sum that the modulus can hold."""
        return int(2 ** (self.modulus_bits - 1) - 1)

    def round(self, values: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.int64]:
        """Values as whole numbers of levels, in [-L, L]."""
        scaled = np.clip(values, -self.clip, self.clip) * self.scale
        rounded = np.floor(scaled + rng.random(len(scaled)))
        return np.clip(rounded, -self.levels, self.levels).astype(np.int64)

    def round_loss(self, loss: float, rng: np.random.Generator) -> int:
        """A loss as a whole number of levels; LARGEST_LOSS is L."""
        share = min(max(loss, 0.0), LARGEST_LOSS) / LARGEST_LOSS
        return int(np.floor(share * self.levels + rng.random()))

    def mean(self, total: NDArray[np.int64], weight: int) -> NDArray[np.float64]:
        """The weighted mean of values from the sum of their levels."""
        return total / (weight * self.scale)

    def mean_loss(self, total: int, weight: int) -> float:
        """The weighted mean of losses from the sum of their levels."""
        return total / (weight * self.levels) * LARGEST_LOSS


def check_weight(weight: int, clients: int) -> None:
    """Raises Damaged where a decoded sum of weights cannot be that of so many clients."""
    if weight < clients:
        raise Damaged(f"the weights of {clients} clients sum to {weight}")
