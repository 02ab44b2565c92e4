"""The gallery: grids of generated images side by side, with real ones."""

import base64
import io
import os
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from fedlight.reporting.comparison import Comparison, Group, Place

TILES = 60  # thumbnails on a page, over all comparisons
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


def build(comparison: Comparison, page: Path, tiles: int) -> tuple[list[Row], int]:
    """The rows of a gallery, and the number of grids for which there was no room.

    Args:
        page: the folder of the page.
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


def _tile(title: str, path: Path, page: Path) -> Tile | None:
    """None where the picture cannot be read."""
    content = io.BytesIO()
    try:
        with Image.open(path) as picture:
            thumbnail = picture.convert("RGB")
            thumbnail.thumbnail((WIDTH, WIDTH * 2))
            thumbnail.save(content, "WEBP", quality=QUALITY)
    except (OSError, UnidentifiedImageError):
        return None
    after = "" if path.stem == "real" else f", round {int(path.stem.removeprefix('round_'))}"
    source = "data:image/webp;base64," + base64.b64encode(content.getvalue()).decode()
    return Tile(f"{title}{after}", source, Path(os.path.relpath(path, page)).as_posix())
