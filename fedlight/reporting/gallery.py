"""The gallery: grids of generated images side by side, with real ones."""

import base64
import io
import os
import re
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, UnidentifiedImageError

from fedlight.reporting import numbers
from fedlight.reporting.comparison import Comparison, Group, Place
from fedlight.runs.reader import Result
from fedlight.runtime.files import atomic
from fedlight.runtime.literal_text import literal_text

TILES = 60  # thumbnails on a page, over all comparisons
SHEET_COLUMNS = 2
WIDTH, QUALITY = 1600, 80  # of a thumbnail: pixels, more than a page shows, so that none is enlarged; WebP


@dataclass(frozen=True)
class Tile:
    """A thumbnail that is part of the page, and where its original is.

    Attributes:
        source: a data URI.
        link: from the page's folder to the PNG.
    """

    title: str
    source: str
    link: str


@dataclass(frozen=True)
class Row:
    """One place of the grid: real images first, where a cell kept some, then the methods."""

    title: str
    tiles: list[Tile]


@literal_text
def write_sheet(comparison: Comparison, place: Place, path: Path) -> None:
    """Draws the grids of a place in one picture, with what each method comes to; nothing without two."""
    grids = [(group, grid) for group in comparison.in_place(place) if (grid := _last_grid(group)) is not None]
    shown = [(group, picture) for group, grid in grids if (picture := _read(grid)) is not None]
    if len(shown) < 2:
        return
    lines = ceil(len(shown) / SHEET_COLUMNS)
    figure = Figure((4.5 * SHEET_COLUMNS, 2.9 * lines), dpi=110, layout="constrained")
    axes = figure.subplots(lines, SHEET_COLUMNS, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, (group, picture) in zip(axes, shown, strict=False):
        axis.imshow(picture)
        axis.set_title(_caption(group), fontsize=10)
    with atomic(path) as temporary:
        FigureCanvasAgg(figure).print_png(temporary)


def _caption(group: Group) -> str:
    """A method and what it comes to."""
    fid = "" if group.fid is None else f", FID {numbers.score(group.fid)}"
    right = []
    for kind, words in (("held", "classes held"), ("unseen", "classes never seen")):
        accuracy = group.mean(partial(Result.quality, name=f"label_accuracy.{kind}"))
        if accuracy is not None:
            right.append(f"{accuracy:.0%} of {words}")
    return f"{group.method}{fid}" + (f"\nright: {', '.join(right)}" if right else "")


def build(comparison: Comparison, page: Path, prefix: str, tiles: int) -> tuple[list[Row], int]:
    """The rows of a gallery, and the number of grids for which there was no room; a row is a PNG as well.

    Args:
        page: the folder of the page.
        prefix: of the names of files.
        tiles: at most so many thumbnails.
    """
    rows, left_out = [], 0
    for place in comparison.places:
        found = _grids(comparison, place)
        if len(found) > tiles:
            left_out += len(found)
            continue
        made = [tile for title, path in found if (tile := _tile(title, path, page)) is not None]
        tiles -= len(made)
        if made:
            rows.append(Row(place.label, made))
            name = re.sub(r"\W+", "_", place.label).strip("_")
            write_sheet(comparison, place, page / f"{prefix}samples_{name}.png")
    return rows, left_out


def _grids(comparison: Comparison, place: Place) -> list[tuple[str, Path]]:
    groups = comparison.in_place(place)
    found = [(group.method, grid) for group in groups if (grid := _last_grid(group)) is not None]
    real = [cell.files.folder / "samples" / "real.png" for group in groups for cell in group.cells]
    return [("real images", path) for path in real if path.is_file()][:1] + found


def _last_grid(group: Group) -> Path | None:
    """The newest grid of the first seed that has one."""
    for cell in group.cells:
        if grids := sorted((cell.files.folder / "samples").glob("round_*.png")):
            return grids[-1]
    return None


def _read(path: Path) -> Image.Image | None:
    """A picture in colour; None where it cannot be read."""
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (OSError, UnidentifiedImageError):
        return None


def _tile(title: str, path: Path, page: Path) -> Tile | None:
    """None where the picture cannot be read."""
    if (thumbnail := _read(path)) is None:
        return None
    content = io.BytesIO()
    thumbnail.thumbnail((WIDTH, WIDTH * 2))
    thumbnail.save(content, "WEBP", quality=QUALITY)
    after = "" if path.stem == "real" else f", round {int(path.stem.removeprefix('round_'))}"
    source = "data:image/webp;base64," + base64.b64encode(content.getvalue()).decode()
    return Tile(f"{title}{after}", source, Path(os.path.relpath(path, page)).as_posix())
