"""What a reader sees of a curve under the pointer: its name, and the values of each of its points."""

from typing import NamedTuple

from fedlight.reporting import numbers


class Point(NamedTuple):
    """A point in the coordinates of its axes, and what it stands for."""

    x: float
    y: float
    text: str


class Curve(NamedTuple):
    """The points of a curve; `name` says whose they are."""

    name: str
    points: list[Point]


def name_curve(method: object, cells: str, **named: object) -> str:
    """A method with the cell that a curve is of, such as `UDEC: CELL and 2 more`.

    Args:
        cells: their ids, separated by spaces.
        named: what else distinguishes the curve; left out where it is `none`.
    """
    first, *others = cells.split(" ")
    also = "".join(f", {key} {value}" for key, value in named.items() if value not in ("none", ""))
    return f"{method}{also}: {first}" + (f" and {len(others)} more" if others else "")


def score_text(head: str, value: float, spread: float | None) -> str:
    """A score with its deviation, if there is one, such as `FID 9.91 ± 0.19`."""
    known = spread is not None and spread == spread
    return f"{head} {numbers.score(value, spread if known else None)}"
