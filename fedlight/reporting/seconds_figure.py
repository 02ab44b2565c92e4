"""The figure of image quality over the time of training."""

from functools import partial

import pandas as pd
from matplotlib.axes import Axes

from fedlight.reporting.comparison import Comparison
from fedlight.reporting.plots import Plot

COLUMNS = ["panel", "method", "round", "seconds", "fid"]


def fid_seconds(comparison: Comparison, prefix: str) -> Plot:
    """FID after each evaluated round over the seconds of training and aggregation."""
    rows = [
        {"panel": place.label, "method": group.method, "round": row["round"], "seconds": spent, "fid": fid}
        for place in comparison.places
        for group in comparison.in_place(place)
        for cell in group.cells
        for row, spent in _timed(cell.files.rounds)
        if (fid := row.get("fid")) is not None
    ]
    data = pd.DataFrame(rows, columns=COLUMNS)
    means = data.groupby(["panel", "method", "round"], sort=False)[["seconds", "fid"]].mean().reset_index()
    points = means.groupby(["panel", "method"])["round"].transform("size")
    return Plot(
        f"{prefix}fid_seconds",
        "Quality over time",
        "FID after each evaluated round over the seconds of training and aggregation so far, without "
        "sampling and scoring; means over seeds. Only times of one machine with the same number of "
        "workers compare.",
        means[points > 1],
        partial(_draw, palette=comparison.palette),
        comparison.palette,
    )


def _timed(rounds: list[dict[str, float | None]]) -> list[tuple[dict[str, float | None], float]]:
    """Each row of `rounds.csv` with the seconds of all rounds up to it; none where a row lacks them."""
    timed, spent = [], 0.0
    for row in rounds:
        seconds = row.get("seconds")
        if seconds is None:
            return []
        spent += seconds
        timed.append((row, spent))
    return timed


def _draw(axis: Axes, rows: pd.DataFrame, palette: dict[str, str]) -> None:
    for method, group in rows.groupby("method", sort=False):
        axis.plot(group["seconds"], group["fid"], color=palette[str(method)], marker="o", markersize=3.5)
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("training and aggregation so far (s)")
    axis.set_ylabel("FID")
