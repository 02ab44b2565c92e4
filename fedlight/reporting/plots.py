"""A figure, one drawing repeated over panels: as PNG and PDF, and as an SVG a panel for the page."""

import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from textwrap import fill
from typing import Any

import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fedlight.reporting.curves import Curve, Point
from fedlight.runtime.files import atomic
from fedlight.runtime.literal_text import LITERAL, escape_missing_glyphs

INK, PALE = "#1B1F24", "#DDE1E6"
WIDTH, HEIGHT = 3.7, 2.9  # of a panel, in inches: readable on a telephone
LEFT, MARGIN = 0.62, 0.12  # what stands around the axes, in inches
TITLE, NAME = 0.2, 0.19  # height of a line of a title, and of the legend, in inches
LETTERS = 44  # of a line of a title
COLUMNS, PANELS = 3, 9  # of a figure; what does not fit is in its CSV
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "legend.fontsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "text.parse_math": False,  # names may hold any character
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.bottom": False,
    "ytick.left": False,
    "grid.color": PALE,
    "grid.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titley": 1.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "fedlight",
    "pdf.fonttype": 42,
    **LITERAL,
}
THEME = (
    f"<style>:root{{--ink:{INK};--pale:{PALE}}}"
    "@media(prefers-color-scheme:dark){:root{--ink:#E6E9ED;--pale:#3A424C}}</style>"
)


@dataclass(frozen=True)
class Plot:
    """A figure before it is drawn.

    Attributes:
        name: of its files, without ending.
        data: what is drawn, and the CSV behind the figure; its column `panel` names the panel.
        draw: draws the rows of one panel, labels and units of its axes included, and returns its curves.
        legend: colour of each method, empty for a figure without.
        below: height of what stands below the axes, in inches.
    """

    name: str
    title: str
    note: str
    data: pd.DataFrame
    draw: Callable[[Axes, pd.DataFrame], list[Curve]]
    legend: Mapping[str, str]
    below: float = 0.5

    @property
    def panels(self) -> list[str]:
        return list(dict.fromkeys(self.data["panel"]))[:PANELS]

    @property
    def left_out(self) -> int:
        """The number of panels that are in the CSV only."""
        return self.data["panel"].nunique() - len(self.panels)

    def write(self, folder: Path) -> None:
        """Writes `name.png`, `name.pdf` and `name.csv`."""
        with atomic(folder / f"{self.name}.csv") as temporary:
            self.data.to_csv(temporary, index=False, errors="replace")  # of a folder's name that is no text
        panels = self.panels
        columns = min(COLUMNS, len(panels))
        lines = ceil(len(panels) / columns)
        titles = {panel: fill(panel, LETTERS) for panel in panels}
        height = HEIGHT + TITLE * max(title.count("\n") + 1 for title in titles.values())
        across = max(1, min(len(self.legend), 3 * columns))
        legend = MARGIN + NAME * ceil(len(self.legend) / across)
        with rc_context(STYLE):
            figure = Figure((WIDTH * columns, height * lines + legend), dpi=160)
            for position, panel in enumerate(panels):
                line, column = divmod(position, columns)
                corner = (WIDTH * column, legend + height * (lines - 1 - line))
                self._draw_panel(figure, corner, panel)[0].set_title(titles[panel])
            if self.legend:
                handles = [Line2D([], [], color=colour, marker="o") for colour in self.legend.values()]
                figure.legend(handles, list(self.legend), loc="lower center", ncols=across, frameon=False)
            FigureCanvasAgg(figure)
            escape_missing_glyphs(figure)
            for ending, metadata in (("png", None), ("pdf", {"CreationDate": None})):
                with atomic(folder / f"{self.name}.{ending}") as temporary:
                    figure.savefig(temporary, format=ending, metadata=metadata)

    def svg(self, panel: str) -> str:
        """One panel for the page, in the colours of the reader's scheme, light or dark."""
        return self.view(panel)[0]

    def view(self, panel: str) -> tuple[str, list[Curve]]:
        """The SVG of one panel, and its curves with points in thousandths of its width and height."""
        with rc_context(STYLE):
            figure = Figure((WIDTH, HEIGHT))
            axis, curves = self._draw_panel(figure, (0, 0), panel)
            content = io.StringIO()
            figure.savefig(content, format="svg", transparent=True, metadata={"Date": None})
            placed = [Curve(curve.name, _place_points(axis, curve.points)) for curve in curves]
        text = re.sub(r"^.*?(?=<svg)", "", content.getvalue(), flags=re.DOTALL)
        text = re.sub(INK, "var(--ink)", re.sub(PALE, "var(--pale)", text, flags=re.I), flags=re.I)
        text = text.replace("'DejaVu Sans'", "system-ui, 'DejaVu Sans'")
        return text.replace("<defs>", f"{THEME}<defs>", 1), placed

    def _draw_panel(
        self, figure: Figure, corner: tuple[float, float], panel: str
    ) -> tuple[Axes, list[Curve]]:
        """Draws one panel, whose lower left corner is given in inches."""
        width, height = figure.get_size_inches()
        axis = figure.add_axes(
            (
                (corner[0] + LEFT) / width,
                (corner[1] + self.below) / height,
                (WIDTH - LEFT - MARGIN) / width,
                (HEIGHT - self.below - MARGIN) / height,
            )
        )
        return axis, self.draw(axis, self.data[self.data["panel"] == panel])


def _place_points(axis: Axes, points: list[Point]) -> list[Point]:
    """Points of the axes in thousandths of the figure, from its upper left corner."""
    figure = axis.get_figure(root=True)
    assert figure is not None
    to_figure = axis.transData + figure.transFigure.inverted()
    placed = [(*to_figure.transform((x, y)), text) for x, y, text in points]
    return [
        Point(round(1000 * x), round(1000 * (1 - y)), text)
        for x, y, text in placed
        if 0 <= x <= 1 and 0 <= y <= 1
    ]
