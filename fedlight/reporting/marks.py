"""Marks that distinguish the points of a figure beside their colour; they are named below its axes."""

from collections.abc import Iterable
from functools import cached_property
from itertools import cycle
from math import ceil
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from fedlight.reporting.plots import INK, WIDTH

SHAPES = "os^DvPX*p<>hd8"


class Marks:
    """A mark for each number of clients, or for each name.

    Args:
        values: numbers of clients, or names.
    """

    def __init__(self, values: Iterable[Any]) -> None:
        self.of: dict[Any, str] = dict(zip(sorted(set(values)), cycle(SHAPES), strict=False))

    @property
    def names(self) -> list[str]:
        return [value if isinstance(value, str) else f"{value} clients" for value in self.of]

    @cached_property
    def _across(self) -> int:
        """The number of names that fit into a line."""
        return int(WIDTH / (0.35 + 0.06 * max(map(len, self.names), default=0)))

    @property
    def below(self) -> float:
        """The height that the names and the axis need below the axes, in inches."""
        return 0.5 + 0.15 * ceil(len(self.of) / self._across)

    def name(self, axis: Axes) -> None:
        """Names the marks below the label of the axis."""
        axis.legend(
            [Line2D([], [], color=INK, marker=shape, linestyle="") for shape in self.of.values()],
            self.names,
            loc="upper center",
            bbox_to_anchor=(0.5, 0),
            borderaxespad=4.5,  # below the label of the axis
            ncols=self._across,
            fontsize=7,
            handletextpad=0.1,
            columnspacing=1,
            frameon=False,
        )
