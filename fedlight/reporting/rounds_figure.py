"""Figures over rounds, one curve per method: FID, loss, exchange, epsilon; and FID over bytes and seconds."""

from collections.abc import Hashable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, MaxNLocator

from fedlight.reporting import numbers
from fedlight.reporting.byte_axis import scale_bytes
from fedlight.reporting.comparison import Comparison
from fedlight.reporting.curves import Curve, Point, name_curve, score_text
from fedlight.reporting.plots import Plot

ALIKE = 0.03  # of their mean, by which curves differ that a reader cannot tell apart
AXES = ["bytes_cumulative", "seconds_cumulative"]
BAND = "Mean over seeds; the band is their standard deviation."


def fid_rounds(comparison: Comparison, prefix: str) -> Plot:
    """FID over rounds, of the cells that were evaluated more than once."""
    plot = _rounds_curve(comparison, f"{prefix}fid_rounds", "FID over rounds", BAND, "fid", "FID")
    return _evaluated_more_than_once(plot)


def train_loss_rounds(comparison: Comparison, prefix: str) -> Plot:
    """Training loss over rounds, in the panels where methods differ."""
    plot = _rounds_curve(
        comparison,
        f"{prefix}train_loss_rounds",
        "Training loss over rounds",
        f"{BAND} A partial method's loss is that of its clients' own models on their own data.",
        "train_loss",
        "training loss",
    )
    return _where_methods_differ(plot, "train_loss")


def exchange_rounds(comparison: Comparison, prefix: str) -> Plot:
    """Parameters exchanged over rounds."""
    return _rounds_curve(
        comparison,
        f"{prefix}exchange_rounds",
        "Exchange over rounds",
        "Parameters exchanged so far, both ways, all clients. The first contact sends the whole model.",
        "params_cumulative",
        "parameters exchanged",
    )


def epsilon_rounds(comparison: Comparison, prefix: str) -> Plot:
    """Epsilon spent over rounds, where it is finite."""
    plot = _rounds_curve(
        comparison,
        f"{prefix}epsilon_rounds",
        "Privacy: epsilon over rounds",
        "What was spent so far, of the client that spent most. Without noise it is infinite from the "
        "first round, and not drawn.",
        "epsilon",
        "epsilon",
    )
    return replace(plot, data=plot.data[np.isfinite(plot.data["epsilon"].astype(float))])


def budget(comparison: Comparison, prefix: str) -> Plot:
    """FID over the bytes exchanged so far: the quality of a method that is stopped early."""
    return _fid_over(
        comparison,
        f"{prefix}budget",
        "Quality at a budget",
        "FID after each evaluated round over the bytes exchanged so far: of two curves at the same height, "
        "the left one has paid less.",
        "bytes_cumulative",
        "exchanged so far (bytes)",
    )


def fid_seconds(comparison: Comparison, prefix: str) -> Plot:
    """FID over the seconds of training so far."""
    return _fid_over(
        comparison,
        f"{prefix}fid_seconds",
        "Quality over time",
        "FID after each evaluated round over the seconds that training and merging took so far, without "
        "evaluation. Compare cells of one machine and of as many workers only.",
        "seconds_cumulative",
        "trained so far (seconds)",
    )


def _fid_over(comparison: Comparison, name: str, title: str, note: str, axis: str, label: str) -> Plot:
    """FID over what was spent so far, where that is more than nothing; `axis` is its column."""
    rows = _history(comparison, "fid")
    draw = partial(_draw_curves, palette=comparison.palette, x=(axis, label), y=("fid", "FID"))
    plot = Plot(name, title, note, rows[rows[axis] > 0], draw, comparison.palette)
    return _evaluated_more_than_once(plot)


def _rounds_curve(comparison: Comparison, name: str, title: str, note: str, key: str, label: str) -> Plot:
    """A column of `rounds.csv` over rounds, one curve per method."""
    draw = partial(_draw_curves, palette=comparison.palette, x=("round", "round"), y=(key, label))
    return Plot(name, title, note, _history(comparison, key), draw, comparison.palette)


def _history(comparison: Comparison, key: str) -> pd.DataFrame:
    """A row for each place, method and round that has a value: mean and deviation over the seeds."""
    columns = list(dict.fromkeys((key, "bytes_cumulative", "seconds")))
    frames = [
        pd.DataFrame(cell.files.rounds, columns=["round", *columns], dtype=float)
        .assign(panel=place.label, method=group.method, cells=cell.cell)
        .assign(seconds_cumulative=lambda rounds: rounds["seconds"].cumsum())
        for place in comparison.places
        for group in comparison.in_place(place)
        for cell in group.cells
        if cell.files.rounds
    ]
    if not frames:
        return pd.DataFrame(columns=["panel", "method", "round", key, f"{key}_std", *AXES, "cells"])
    grouped = pd.concat(frames).groupby(["panel", "method", "round"], sort=False)
    rows = grouped[list(dict.fromkeys((key, *AXES)))].mean()
    rows.insert(1, f"{key}_std", grouped[key].std())
    rows["cells"] = grouped["cells"].agg(" ".join)
    return rows[rows[key].notna()].reset_index()


def _draw_curves(
    axis: Axes, rows: pd.DataFrame, palette: dict[str, str], x: tuple[str, str], y: tuple[str, str]
) -> list[Curve]:
    (across, x_label), (key, y_label) = x, y
    curves = []
    for method, group in rows.groupby("method", sort=False):
        colour = palette[str(method)]
        marker = "o" if len(group) <= 20 else None
        axis.plot(group[across], group[key], color=colour, marker=marker, markersize=3.5)
        spread = group[f"{key}_std"].astype(float).fillna(0)
        if spread.any():
            low, high = group[key] - spread, group[key] + spread
            axis.fill_between(group[across], low, high, color=colour, alpha=0.2, linewidth=0)
        points = [
            Point(line[across], line[key], _describe(line, across, key, y_label))
            for line in group.to_dict("records")
        ]
        curves.append(Curve(name_curve(method, group["cells"].iloc[0]), points))
    if across == "round":
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    elif across == "bytes_cumulative":
        scale_bytes(axis)
    else:
        axis.set_xlim(left=0)
        axis.xaxis.set_major_locator(MaxNLocator(5))
    if key == "params_cumulative":
        axis.yaxis.set_major_formatter(EngFormatter())
    axis.set_ylim(bottom=0)
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)
    return curves


def _describe(line: dict[Hashable, Any], across: str, key: str, label: str) -> str:
    """A point in words."""
    at = f"round {line['round']:.0f}"
    if across == "bytes_cumulative":
        at += f", {numbers.data_volume(line[across])}"
    elif across == "seconds_cumulative":
        at += f", {numbers.seconds(line[across])}"
    if key == "params_cumulative":
        return f"{at}: {numbers.count(line[key])} parameters"
    return f"{at}: {score_text(label, line[key], line[f'{key}_std'])}"


def _evaluated_more_than_once(plot: Plot) -> Plot:
    """Without the curves that have one point."""
    points = plot.data.groupby(["panel", "method"])["round"].transform("size")
    return replace(plot, data=plot.data[points > 1])


def _where_methods_differ(plot: Plot, key: str) -> Plot:
    """Without the panels whose curves lie on each other; the first stays where all do."""
    rounds = plot.data.groupby(["panel", "round"], sort=False)[key]
    apart = ((rounds.max() - rounds.min()) / rounds.mean()).groupby("panel", sort=False).max()
    several = plot.data.groupby("panel")["method"].nunique().max() > 1 if len(apart) else False
    alike = list(apart[apart < ALIKE].index) if several else []
    if not alike:
        return plot
    shown = [panel for panel in apart.index if panel not in alike] or alike[:1]
    note = f"In {len(alike)} of {len(apart)} panels the methods' curves lie within {ALIKE:.0%} of each other"
    note += "; those are left out." if shown != alike[:1] else ", and one of those stands for all."
    return replace(plot, note=f"{plot.note} {note}", data=plot.data[plot.data["panel"].isin(shown)])
