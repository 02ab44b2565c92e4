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

from fedlight.reporting import figures, gallery, leakage, paper
from fedlight.reporting.comparison import Comparison, make_comparisons
from fedlight.reporting.curves import Curve
from fedlight.reporting.difference_table import differences
from fedlight.reporting.headline import headline
from fedlight.reporting.plots import Plot
from fedlight.reporting.provenance import trace
from fedlight.reporting.search_table import search_tables
from fedlight.reporting.summaries import by_cell, summaries
from fedlight.reporting.tables import ReportTable
from fedlight.runs.plan import read_launches
from fedlight.runs.status import DONE, MISSING, SweepCell, find_sweeps, read_sweep
from fedlight.runtime.errors import BadInput
from fedlight.runtime.files import atomic


@dataclass(frozen=True)
class Drawing:
    """A figure on the page; `panels` are title, image, a data URI, and curves."""

    plot: Plot
    panels: list[tuple[str, str, list[Curve]]]


@dataclass(frozen=True)
class Chapter:
    """The part of the page on one comparison."""

    comparison: Comparison
    headline: str
    accuracy: list[float]
    tables: list[ReportTable]
    drawings: list[Drawing]
    gallery: list[gallery.Row]
    left_out: int
    cells: ReportTable


def write_report(sweeps: list[Path], folder: Path) -> list[SweepCell]:
    """Writes `index.html` with every table and figure beside it.

    Args:
        sweeps: the folders that hold the cells.
        folder: where the report goes; it is made, and files of an earlier report are replaced.

    Returns:
        The cells that it reports on.

    Raises:
        BadInput: there is no cell to report on, or the folder cannot be written.
    """
    cells = read_cells(sweeps)
    comparisons = make_comparisons(cells)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        chapters, tiles = [], gallery.TILES
        for comparison in comparisons:
            prefix = f"{comparison.key}_" if len(comparisons) > 1 else ""
            chapter = _chapter(comparison, cells, folder, prefix, tiles)
            tiles -= sum(len(row.tiles) for row in chapter.gallery)
            chapters.append(chapter)
        searches = search_tables(sweeps)
        for table in searches:
            table.write(folder)
        html = _template().render(
            title=", ".join(sweep.resolve().name for sweep in sweeps),
            made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
            version=version("fedlight"),
            command=shlex.join(["python", "-m", "fedlight.report", *map(str, sweeps), "--out", str(folder)]),
            chapters=chapters,
            states=Counter(cell.state for cell in cells),
            noted=[cell for cell in cells if cell.state != DONE or cell.note],
            empty=[sweep for sweep in sweeps if all(cell.files.folder.parent != sweep for cell in cells)],
            commands=[launch.command_line for sweep in sweeps for launch in read_launches(sweep)],
            provenance=trace(cells),
            searches=searches,
        )
        with atomic(folder / "index.html") as temporary:
            temporary.write_text(html, encoding="utf-8", errors="replace")  # of a file's name that is no text
    except OSError as error:
        raise BadInput(f"--out: cannot write to {folder}: {error.strerror or error}") from error
    return cells


def read_cells(sweeps: list[Path]) -> list[SweepCell]:
    """Every cell of the given sweeps, once; of two with the same id, the one that is done is preferred.

    Raises:
        BadInput: a folder is not there, or none of them holds a cell.
    """
    cells: dict[str, SweepCell] = {}
    for sweep in sweeps:
        if not sweep.is_dir():
            raise BadInput(f"{sweep}: no such folder; a sweep is a folder like runs/NAME")
        for cell in read_sweep(sweep):
            other = cells.get(cell.cell)
            if other is None or other.state == MISSING or (cell.state == DONE != other.state):
                cells[cell.cell] = cell
    if not cells:
        folders = ", ".join(map(str, sweeps))
        if inside := ", ".join(str(path) for sweep in sweeps for path in find_sweeps(sweep)):
            raise BadInput(f"{folders}: no cell here, but sweeps to report on: {inside}")
        raise BadInput(f"{folders}: no cell here; python -m fedlight.run name=NAME puts cells into runs/NAME")
    return list(cells.values())


def _chapter(
    comparison: Comparison, everywhere: list[SweepCell], folder: Path, prefix: str, tiles: int
) -> Chapter:
    tables = summaries(comparison, prefix)
    if (paired := differences(comparison, prefix)) is not None:
        tables.insert(1, paired)
    if (published := paper.beside_paper(comparison, prefix)) is not None:
        tables.append(published)
    tables += leakage.tables(comparison, prefix)
    cells = by_cell(comparison.cells, prefix, everywhere)
    for table in (*tables, cells):
        table.write(folder)
    plots = figures.make_plots(comparison, prefix)
    with ProcessPoolExecutor() as pool:  # drawing is most of the work
        drawn = pool.map(partial(_draw, folder), plots)
        rows, left_out = gallery.build(comparison, folder, prefix, tiles)
        drawings = [Drawing(plot, panels) for plot, panels in zip(plots, drawn, strict=True)]
    results = [cell.files.result for cell in comparison.cells if cell.files.result]
    known = {result.fid.extractor_accuracy for result in results if result.fid}
    accuracy = sorted(value for value in known if value is not None)
    return Chapter(comparison, headline(comparison), accuracy, tables, drawings, rows, left_out, cells)


def _draw(folder: Path, plot: Plot) -> list[tuple[str, str, list[Curve]]]:
    """Writes the files of a figure; returns title, image and curves of its panels."""
    plot.write(folder)
    uri = "data:image/svg+xml;base64,"
    panels = []
    for panel in plot.panels:
        svg, curves = plot.view(panel)
        panels.append((panel, uri + base64.b64encode(svg.encode()).decode(), curves))
    return panels


def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("fedlight.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html")
