"""Where the noise of privacy comes from: a cell's seed in simulation, the operating system in deployment."""

import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from fedlight.runtime.seeds import stream


class Normal(Protocol):
    """Gives standard normal numbers; a NumPy generator is one."""

    def standard_normal(self, size: Any) -> NDArray[np.float64]:
        """Independent numbers of mean 0 and variance 1, of the given shape."""


class Source(Protocol):
    """Gives the noise of the release that is named by `key`, such as ("server", 3)."""

    def __call__(self, *key: int | str) -> Normal:
        """Made anew for each release."""


class SeededNoise:
    """Noise that the seed of the cell decides: whoever knows the seed can take it away again."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __call__(self, *key: int | str) -> Normal:
        return stream(self._seed, "noise", *key)


class SecretNoise:
    """Noise from the operating system's cryptographic generator; nobody can draw it again, nor can a restart.

    So a round that is done again after a kill is a release of its own. Each release is noted on the disk
    before its noise is drawn.

    Args:
        notes: the file where releases are noted, a byte each; None where they are not.
    """

    def __init__(self, notes: Path | None = None) -> None:
        self._notes = notes

    def __call__(self, *key: int | str) -> Normal:
        if self._notes:
            note(self._notes)
        return SystemNormal()


def note(path: Path) -> None:
    """Adds a byte to a file; afterwards it is on the disk."""
    with path.open("ab") as file:
        file.write(b".")
        file.flush()
        os.fsync(file.fileno())


class SystemNormal:
    """Normal numbers from `os.urandom`, by the inverse of their distribution function."""

    def standard_normal(self, size: Any) -> NDArray[np.float64]:
        count = int(np.prod(size))
        bits = np.frombuffer(os.urandom(8 * count), np.uint64) >> np.uint64(12)
        uniform = (bits + 0.5) / 2.0**52  # in (0, 1), both ends excluded
        normal: NDArray[np.float64] = ndtri(uniform).reshape(size)
        return normal
