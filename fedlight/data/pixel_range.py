"""`data.range`: which values of a set's image files become black (0) and white (255)."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeAlias

from fedlight.data.image_file import Depth, format_number
from fedlight.runtime.errors import BadInput
from fedlight.runtime.printable import legible

Range: TypeAlias = Literal["type", "measured"] | Sequence[float]
"""The user's choice: the values that the file type can hold; the smallest and largest of all files; or two
numbers."""
Bounds: TypeAlias = tuple[float, float]
"""The values that become 0 and 255."""


class UsedValues:
    """The values that occur in a set's files, by depth.

    Args:
        setting: "type", "measured", or the two numbers of `data.range`.
    """

    def __init__(self, setting: str | Bounds) -> None:
        self._setting = setting
        self._files: Counter[Depth] = Counter()
        self._first: dict[Depth, Path] = {}
        self._used: dict[Depth, Bounds] = {}

    def add(self, path: Path, depth: Depth, used: Bounds | None) -> None:
        """Counts one file with its smallest and largest visible value; None where all is transparent."""
        self._files[depth] += 1
        self._first.setdefault(depth, path)
        if used:
            low, high = self._used.get(depth, used)
            self._used[depth] = min(low, used[0]), max(high, used[1])

    def check(self) -> None:
        """Raises BadInput where `data.range` does not fit the files."""
        if self._setting == "type":
            for depth in filter(lambda depth: depth.largest is None, self._used):
                low, high = map(format_number, self._used[depth])
                pair = f", or two numbers, such as 'data.range=[{low},{high}]'" if low != high else ""
                advice = f"set data.range=measured{pair}"
                if len(self._files) > 1:
                    advice = "save them as the other files of the set"
                raise BadInput(
                    f"data.range: {self._describe(depth)} hold {depth.name} values, {low} to {high}, and "
                    f"their type does not say what is black and white: {advice}"
                )
            return
        if len(self._files) > 1:
            kinds = ", ".join(f"{self._describe(depth)} of {depth.name}" for depth in self._files)
            raise BadInput(
                f"data.range: one range is for files of one depth, and the set holds {kinds}: "
                "save all alike, or leave data.range out"
            )
        if any(depth.upper_bits_only for depth in self._files):
            raise BadInput(
                "data.range: colour of 16 bits a channel is read by its upper eight bits only: "
                "save the images with 8 bits a channel, scaled, and leave data.range out"
            )

    def bounds(self) -> Bounds:
        """The smallest and the largest value of all files.

        Raises:
            BadInput: no file could be read, or all values are equal.
        """
        low, high = next(iter(self._used.values()), (0, 0))
        if not low < high:
            raise BadInput("data.range=measured: no two values of the set differ")
        return low, high

    def notes(self, bounds: Bounds | None) -> list[str]:
        """Lines for the user: the measured range, or a warning where the files use less than half of a range.

        Args:
            bounds: the values that became 0 and 255; None for those of the file type.
        """
        notes = []
        for depth, (low, high) in self._used.items():
            used, count = f"{format_number(low)} to {format_number(high)}", self._files[depth]
            if self._setting == "measured":
                notes.append(f"data.range=measured: {depth.name} values {used} become 0 to 255")
                continue
            black, white = bounds or (0, depth.largest or 0)
            if high > low and min(high, white) - max(low, black) < (white - black) / 2:
                assumed = f"{format_number(black)} to {format_number(white)}"
                notes.append(
                    f"data.range: warning: {count:,} {depth.name} files use the values {used} only, and "
                    f"{assumed} were taken for black to white, so that images have little contrast: "
                    + (_advise(depth, low, high) if len(self._files) == 1 else "save all files alike, scaled")
                )
        return notes

    def _describe(self, depth: Depth) -> str:
        """The number of files of a depth, and one of them."""
        return f"{self._files[depth]:,} files such as {legible(str(self._first[depth]))}"


def _advise(depth: Depth, low: float, high: float) -> str:
    """What to do where the files use less than half of a range."""
    if depth.upper_bits_only:
        return "save them with 8 bits a channel, scaled"
    bits = max(1, math.ceil(math.log2(high + 1))) if high > 0 else 0
    fits = low >= 0 and depth.largest is not None and 2**bits - 1 < depth.largest
    first, last = (0, 2**bits - 1) if fits else (low, high)
    return f"set 'data.range=[{format_number(first)},{format_number(last)}]' or data.range=measured"
