"""Sources of privacy noise: the cell's seed in a simulation, the operating system in a deployment."""

import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedlight.runtime.files import no_follow
from fedlight.runtime.seeds import stream
from fedlight.runtime.system_random import SystemGenerator


class Normal(Protocol):
    """Draws standard normal and uniform numbers; NumPy's Generator has this interface."""

    def random(self, size: Any) -> NDArray[np.float64]:
        """Independent numbers, uniform in (0, 1), in the given shape."""

    def standard_normal(self, size: Any) -> NDArray[np.float64]:
        """Independent numbers with mean 0 and variance 1, in the given shape."""


class Source(Protocol):
    """Makes the generator of the noise of one release, which `key` names, such as ("server", 3)."""

    def __call__(self, *key: int | str) -> Normal:
        """A new generator for this release."""


class SeededNoise:
    """Noise from the seed of the cell: whoever knows the seed can subtract it."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __call__(self, *key: int | str) -> Normal:
        return stream(self._seed, "noise", *key)


class SecretNoise:
    """Noise from the operating system's cryptographic generator, which cannot be reproduced.

    A round that is repeated after a kill is therefore another release. Each release is recorded on disk
    before its noise is drawn.

    Args:
        notes: file with one byte for each release; None where releases are not recorded.
    """

    def __init__(self, notes: Path | None = None) -> None:
        self._notes = notes

    def __call__(self, *key: int | str) -> Normal:
        if self._notes:
            note(self._notes)
        return SystemGenerator()


def note(path: Path) -> None:
    """Appends a byte to a file and syncs it to disk; a symbolic link is not followed."""
    with open(path, "ab", opener=no_follow) as file:
        file.write(b".")
        file.flush()
        os.fsync(file.fileno())
