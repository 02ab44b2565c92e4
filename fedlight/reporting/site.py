"""The report's folder: figures, tables and the page that shows them."""

import base64
import shlex
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from fedlight.reporting import figures, gallery, paper
from fedlight.reporting.comparison import Board, make_boards
from fedlight.reporting.grid import read_plan
from fedlight.reporting.plots import Plot
from fedlight.reporting.provenance import trace
from fedlight.reporting.records import Record, read_sweeps
from fedlight.reporting.summaries import by_cell, summaries
from fedlight.reporting.tables import Table
from fedlight.runs.palette import colours
from fedlight.runtime.errors import BadInput
from fedlight.runtime.files import atomic


@dataclass(frozen=True)
class Drawing:
    """A figure on the page; `panels` are title and image, a data URI."""

    plot: Plot
    panels: list[tuple[str, str]]


@dataclass(frozen=True)
class Chapter:
    """What the page says of one board."""

    board: Board
    palette: dict[str, str]
    accuracy: list[float]
    tables: list[Table]
    drawings: list[Drawing]
    wall: list[gallery.Row]
    left_out: int
    cells: Table


def write_report(sweeps: list[Path], folder: Path) -> list[Record]:
    """Writes `index.html` with every table and figure beside it.

    Args:
        sweeps: the folders that hold the cells.
        folder: where the report goes; it is made, and files of an earlier report are replaced.

    Returns:
        What was read of each cell.

    Raises:
        BadInput: there is no cell to report on, or the folder cannot be written.
    """
    records = read_sweeps(sweeps)
    plans = {sweep: read_plan(sweep) for sweep in sweeps}
    boards = make_boards(records, [plan.axes for plan in plans.values() if plan and plan.axes])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        chapters, tiles = [], gallery.TILES
        for board in boards:
            chapter = _chapter(board, folder, f"{board.key}_" if len(boards) > 1 else "", tiles)
            tiles -= sum(len(row.tiles) for row in chapter.wall)
            chapters.append(chapter)
        html = _template().render(
            title=", ".join(sweep.resolve().name for sweep in sweeps),
            made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
            version=version("fedlight"),
            command=shlex.join(["python", "-m", "fedlight.report", *map(str, sweeps), "--out", str(folder)]),
            chapters=chapters,
            states=Counter(record.status for record in records),
            troubled=[record for record in records if record.status != "completed" or record.note],
            empty=[s for s in sweeps if all(record.folder.parent != s for record in records)],
            commands=[plan.command for plan in plans.values() if plan],
            provenance=trace(records),
        )
        with atomic(folder / "index.html") as temporary:
            temporary.write_text(html)
    except OSError as error:
        raise BadInput(f"--out: cannot write to {folder}: {error.strerror or error}") from error
    return records


def _chapter(board: Board, folder: Path, prefix: str, tiles: int) -> Chapter:
    printed = summaries(board, prefix)
    if (beside := paper.comparison(board, prefix)) is not None:
        printed.append(beside)
    cells = by_cell(board, prefix)
    for table in (*printed, cells):
        table.write(folder)
    plots = figures.plots(board, prefix)
    with ProcessPoolExecutor() as pool:  # drawing is most of the work
        drawn = pool.map(partial(_draw, folder), plots)
        rows, left_out = gallery.hang(board, folder, tiles)
        drawings = [Drawing(plot, panels) for plot, panels in zip(plots, drawn, strict=True)]
    scores = [record.result.fid for record in board.records if record.result and record.result.fid]
    accuracy = sorted({s.extractor_accuracy for s in scores if s.extractor_accuracy is not None})
    return Chapter(board, colours(set(board.methods)), accuracy, printed, drawings, rows, left_out, cells)


def _draw(folder: Path, plot: Plot) -> list[tuple[str, str]]:
    """Writes the files of a figure; returns title and image of its panels."""
    plot.write(folder)
    uri = "data:image/svg+xml;base64,"
    return [(panel, uri + base64.b64encode(plot.svg(panel).encode()).decode()) for panel in plot.panels]


def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("fedlight.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html")
