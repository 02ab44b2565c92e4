"""The table that a sweep prints in the terminal when it ends."""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedlight.reporting.tables import ReportTable
from fedlight.runs.plan import PLAN

SETTINGS = ("data.name", "partition.name", "model.name", "rounds", "epochs", "fraction", "seed")
"""Configuration keys whose value stands in the title where all cells share it."""

HIDDEN = {
    *("sweep", "cell", "status", "exchanged"),
    *("KID", "precision", "recall", "IS", "entropy", "density", "coverage (kNN)"),
}
"""Columns that are in the report only, beside those of `MEASURED_COSTS`."""

WIDTH = 240  # at most, in a file or a pipe, in characters


@contextmanager
def summarise_at_end(sweep: Path) -> Iterator[None]:
    """Prints the table of a sweep at the end of its command, however that ends.

    Folders that the command created and left without a cell are removed again.

    Args:
        sweep: its folder.
    """
    created = [path for path in (sweep / PLAN, sweep, sweep.parent) if not path.exists()]
    try:
        yield
    finally:
        if any(path.is_dir() and path.name != PLAN for path in sweep.glob("*")):  # a cell, or logs of jobs
            print_summary(sweep)
        else:
            if sweep / PLAN in created:
                shutil.rmtree(sweep / PLAN, ignore_errors=True)
            for path in created:
                with suppress(OSError):
                    path.rmdir()


def print_summary(sweep: Path) -> None:
    """Prints a row for each cell that has a result; settings that all of them share stand in the title.

    Where there are several seeds, the means over them with their 95 % intervals follow.
    """
    from fedlight.reporting import numbers
    from fedlight.reporting.comparison import make_comparisons
    from fedlight.reporting.headline import headline
    from fedlight.reporting.summaries import MEASURED_COSTS, by_cell, by_method, head
    from fedlight.runs.status import read_sweep

    cells = [cell for cell in read_sweep(sweep) if cell.files.result]
    if not cells:
        return
    table = by_cell(cells)
    shared = {}
    for key in (*SETTINGS, "evaluation.extractor"):
        values = {numbers.plain(cell.files.config.get(key)) for cell in cells}
        if len(values) == 1:
            shared[head(key)] = values.pop()
    title = ", ".join(f"{name} {value}" for name, value in shared.items())
    hidden = {*HIDDEN, *shared, *(cost.head for cost in MEASURED_COSTS)}
    columns = [column for column in table.columns if column not in hidden]
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    console.print(_render(table, f"{sweep}: {len(cells)} cells, {title}", [*columns, "status"]))
    for comparison in make_comparisons(cells):
        if comparison.evaluated and comparison.has_intervals:
            means = by_method(comparison, "")
            console.print(_render(means, f"{means.title}, {comparison.key}: mean over seeds", means.columns))
            console.print(headline(comparison), soft_wrap=True)
    seeds = {cell.files.config.get("seed") for cell in cells}
    if (
        len(cells) > 1
        and len(seeds) == 1
        and any(cell.files.result and cell.files.result.fid for cell in cells)
    ):
        console.print("one seed: cells may differ by chance as much as seeds do", soft_wrap=True)
    console.print(f"tables, figures and samples: python -m fedlight.report {sweep}", soft_wrap=True)


def _render(table: ReportTable, title: str, columns: list[str]) -> Table:
    """The given columns of a table; marked fields are bold."""
    printed = Table(title=Text(title), title_justify="left")
    shown = [table.columns.index(column) for column in columns]
    for column in columns:
        justify: Literal["left", "right"] = "right" if column in table.numeric else "left"
        printed.add_column(column, justify=justify, overflow="fold")
    for row in table.rows:
        fields = [row[i] for i in shown]
        printed.add_row(
            *(Text(f"{f.text} {f.detail}".strip(), style="bold" if f.best else "") for f in fields)
        )
    return printed
