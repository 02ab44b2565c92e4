"""Random numbers of the operating system's cryptographic generator, for secret draws."""

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri


class SystemGenerator:
    """Has two methods of a NumPy generator; each number takes 8 bytes of `os.urandom`.

    It has no seed and no state, so draws cannot be predicted, and a forked process does not repeat any. A
    generator of NumPy or torch is no substitute: the state of NumPy's can be reconstructed from their output,
    and torch's on the CPU uses 32 bits of its seed.
    """

    def random(self, size: Any) -> NDArray[np.float64]:
        """Independent numbers, uniform in (0, 1), of the given shape; both ends are excluded."""
        bits = np.frombuffer(os.urandom(8 * int(np.prod(size))), np.uint64) >> np.uint64(12)
        uniform: NDArray[np.float64] = ((bits + 0.5) / 2.0**52).reshape(size)
        return uniform

    def standard_normal(self, size: Any) -> NDArray[np.float64]:
        """Independent standard normal numbers of the given shape, by the inverse distribution function."""
        normal: NDArray[np.float64] = ndtri(self.random(size))
        return normal
