"""Cells that are launched one by one while others run: what a search needs of a launcher."""

from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

from hydra.plugins.launcher import Launcher

from fedlight.runtime.errors import CellFailed


class CellPool(Protocol):
    """Runs cells at the same time, up to a number.

    Attributes:
        size: maximum number of cells at once.
    """

    size: int

    def start(self, cells: Sequence[list[str]], first: int) -> None:
        """Starts cells and returns at once.

        Args:
            cells: their overrides; at most `size` cells may be under way.
            first: number of the first one in this command.
        """
        ...

    def wait(self) -> list[list[str]]:
        """Waits until at least one cell has ended, however; returns the overrides of those that have."""
        ...

    def close(self) -> None:
        """Ends the cells that still run on this machine; SLURM keeps its jobs."""
        ...


class OneByOne:
    """A pool of one cell for any launcher of Hydra, whose call returns when the cell has ended."""

    size = 1

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self._started: deque[tuple[list[str], int]] = deque()

    def start(self, cells: Sequence[list[str]], first: int) -> None:
        self._started.extend(zip(cells, range(first, first + len(cells)), strict=True))

    def wait(self) -> list[list[str]]:
        cell, number = self._started.popleft()
        for end in self._launcher.launch([cell], initial_job_idx=number):
            with suppress(CellFailed):  # it was printed, and the cell's folder tells
                _ = end.return_value
        return [cell]

    def close(self) -> None:
        self._started.clear()


def open_pool(launcher: Launcher, most: int) -> CellPool:
    """The pool of a launcher that has one (`open_pool`), else a pool of one cell.

    Args:
        launcher: of the sweep.
        most: number of cells at once that are of use.
    """
    pool: CellPool = launcher.open_pool(most) if hasattr(launcher, "open_pool") else OneByOne(launcher)
    return pool
