"""The gallery: grids of generated images side by side, with real ones."""

import base64
import io
import re
import struct
import zlib
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from fedlight.reporting import numbers
from fedlight.reporting.comparison import Comparison, Group, Place
from fedlight.reporting.file_name import file_name
from fedlight.runs.reader import Result
from fedlight.runs.status import SweepCell
from fedlight.runtime.files import atomic
from fedlight.runtime.literal_text import escape_missing_glyphs, literal_text

GRID = re.compile(r"round_([0-9]{1,9})\.png")
BROKEN = (OSError, SyntaxError, ValueError, struct.error, zlib.error, Image.DecompressionBombError)
"""What Pillow raises for a file that is no picture, or too large."""

TILES = 60  # thumbnails on a page, over all comparisons
SHEET_COLUMNS = 2
WIDTH, QUALITY = 1600, 80  # of a thumbnail: pixels, more than a page shows, so that none is enlarged; WebP


@dataclass(frozen=True)
class Tile:
    """A thumbnail in the page; `source` is a data URI."""

    title: str
    source: str


@dataclass(frozen=True)
class Row:
    """One place of the grid: real images first, where a cell stored some, then the methods."""

    title: str
    tiles: list[Tile]


@dataclass(frozen=True)
class Grid:
    """A picture of a cell; `round` is None for the real images."""

    cell: SweepCell
    name: str
    round: int | None = None

    @property
    def path(self) -> Path:
        return self.cell.files.folder / "samples" / self.name

    def read(self) -> Image.Image | None:
        """The picture in colour; None where it cannot be read, which the report says beside the cell."""
        try:
            with Image.open(self.path, formats=("PNG",)) as picture:
                return picture.convert("RGB")
        except BROKEN as error:
            self.cell.files.report(f"samples/{self.name}", error)
            return None


@literal_text
def write_sheet(comparison: Comparison, place: Place, path: Path) -> None:
    """Draws the grids of a place in one picture, titled with each method's scores; needs two grids."""
    grids = [(group, grid) for group in comparison.in_place(place) if (grid := _last_grid(group)) is not None]
    shown = [(group, picture) for group, grid in grids if (picture := grid.read()) is not None]
    if len(shown) < 2:
        return
    lines = ceil(len(shown) / SHEET_COLUMNS)
    figure = Figure((4.5 * SHEET_COLUMNS, 2.9 * lines), dpi=110, layout="constrained")
    axes = figure.subplots(lines, SHEET_COLUMNS, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, (group, picture) in zip(axes, shown, strict=False):
        axis.imshow(picture)
        axis.set_title(_caption(group), fontsize=10, parse_math=False)
    escape_missing_glyphs(figure)
    with atomic(path) as temporary:
        FigureCanvasAgg(figure).print_png(temporary)


def _caption(group: Group) -> str:
    """A method with its FID and its label accuracy."""
    fid = "" if group.fid is None else f", FID {numbers.score(group.fid)}"
    accuracies = []
    for kind, words in (("held", "seen classes"), ("unseen", "unseen classes")):
        accuracy = group.mean(partial(Result.quality, name=f"label_accuracy.{kind}"))
        if accuracy is not None:
            accuracies.append(f"{accuracy:.0%} ({words})")
    return f"{group.method}{fid}" + (f"\nlabel accuracy {', '.join(accuracies)}" if accuracies else "")


def build(comparison: Comparison, page: Path, prefix: str, tiles: int) -> tuple[list[Row], int]:
    """The rows of a gallery, and the number of grids that are left out. Each row is also written as a PNG.

    Args:
        page: the folder of the page.
        prefix: of the names of files.
        tiles: the maximum number of thumbnails.
    """
    rows, left_out = [], 0
    for place in comparison.places:
        grids = _grids(comparison, place)
        if len(grids) > tiles:
            left_out += len(grids)
            continue
        thumbnails = [tile for title, grid in grids if (tile := _tile(title, grid)) is not None]
        tiles -= len(thumbnails)
        if thumbnails:
            rows.append(Row(place.label, thumbnails))
            name = file_name(re.sub(r"\W+", "_", place.label).strip("_"))
            write_sheet(comparison, place, page / f"{prefix}samples_{name}.png")
    return rows, left_out


def _grids(comparison: Comparison, place: Place) -> list[tuple[str, Grid]]:
    groups = comparison.in_place(place)
    grids = [(group.method, grid) for group in groups if (grid := _last_grid(group)) is not None]
    real = [Grid(cell, "real.png") for group in groups for cell in group.cells]
    return [("real images", grid) for grid in real if grid.path.is_file()][:1] + grids


def _last_grid(group: Group) -> Grid | None:
    """The newest grid of the first seed that has one."""
    for cell in group.cells:
        names = [path.name for path in (cell.files.folder / "samples").glob("round_*.png")]
        if grids := sorted((int(match[1]), match[0]) for name in names if (match := GRID.fullmatch(name))):
            round_, name = grids[-1]
            return Grid(cell, name, round_)
    return None


def _tile(title: str, grid: Grid) -> Tile | None:
    """None where the picture cannot be read."""
    if (thumbnail := grid.read()) is None:
        return None
    content = io.BytesIO()
    thumbnail.thumbnail((WIDTH, WIDTH * 2))
    thumbnail.save(content, "WEBP", quality=QUALITY)
    after = "" if grid.round is None else f", round {grid.round}"
    source = "data:image/webp;base64," + base64.b64encode(content.getvalue()).decode()
    return Tile(f"{title}{after}", source)
