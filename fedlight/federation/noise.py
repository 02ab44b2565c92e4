"""Where the noise of privacy comes from: a cell's seed in simulation, the operating system in deployment."""

import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedlight.runtime.files import no_follow
from fedlight.runtime.seeds import stream
from fedlight.runtime.system_random import SystemGenerator


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
        return SystemGenerator()


def note(path: Path) -> None:
    """Adds a byte to a file; afterwards it is on the disk. A symbolic link is not followed."""
    with open(path, "ab", opener=no_follow) as file:
        file.write(b".")
        file.flush()
        os.fsync(file.fileno())
