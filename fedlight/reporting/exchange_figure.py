"""The figure of image quality against what was exchanged."""

from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from fedlight.reporting import numbers
from fedlight.reporting.byte_axis import scale_bytes
from fedlight.reporting.comparison import Comparison
from fedlight.reporting.curves import Curve, Point, name_curve, score_text
from fedlight.reporting.marks import Marks
from fedlight.reporting.plots import INK, Plot
from fedlight.reporting.setting_keys import describe_setting

TRANSFORM = "transform.name"  # beside methods it is what decides how many bytes are exchanged


def quality_exchange(comparison: Comparison, prefix: str) -> Plot:
    """FID over the bytes exchanged, both ways, in all rounds: the question of the paper."""
    rows = [
        {
            "panel": place._replace(setting=describe_setting(_but_transform(settings))).panel,
            "method": group.method,
            "transform": settings.get(TRANSFORM) or "none",
            "clients": place.clients,
            "bytes": group.mean(lambda result: result.exchange.bytes_total),
            "fid": group.fid,
            "fid_std": group.spread[0],
            "fid_std_over": group.spread[1],
            "cells": group.names,
        }
        for place in comparison.places
        for settings in [comparison.settings[place.setting]]
        for group in comparison.in_place(place)
        if group.fid is not None
    ]
    columns = ["panel", "method", "transform", "clients", "bytes", "fid", "fid_std", "fid_std_over", "cells"]
    data = pd.DataFrame(rows, columns=columns)
    key = "transform" if data["transform"].nunique() > 1 else "clients"
    marks = Marks(data[key])
    return Plot(
        f"{prefix}quality_exchange",
        "Quality against exchange",
        "One curve per method and transform, from the fewest clients to the most. Lower left is better: good "
        "images for few bytes; nothing lies below the dotted frontier. Bars: standard deviation over seeds "
        "or clients. Dashed: nothing is exchanged.",
        data,
        partial(_draw_quality, palette=comparison.palette, key=key, marks=marks),
        comparison.palette,
        below=marks.below,
    )


def _draw_quality(
    axis: Axes, rows: pd.DataFrame, palette: dict[str, str], key: str, marks: Marks
) -> list[Curve]:
    """Draws a curve for each method and transform; a mark stands for each value of `key`."""
    curves = []
    for (method, transform), group in rows.groupby(["method", "transform"], sort=False):
        colour, points = palette[str(method)], group[group["bytes"] > 0].sort_values("clients")
        if points.empty:
            axis.axhline(group["fid"].iloc[0], color=colour, linestyle="--")
            continue
        spread = points["fid_std"].astype(float)
        axis.errorbar(points["bytes"], points["fid"], spread, color=colour, elinewidth=1, capsize=2)
        for x, y, value in zip(points["bytes"], points["fid"], points[key], strict=True):
            axis.plot(x, y, color=colour, marker=marks.of[value])
        curves += [
            Curve(
                name_curve(method, line.cells, transform=transform),
                [
                    Point(
                        line.bytes,
                        line.fid,
                        f"{line.clients} clients, {numbers.data_volume(line.bytes)}: "
                        f"{score_text('FID', line.fid, line.fid_std)}",
                    )
                ],
            )
            for line in points.itertuples()
        ]
    ends = frontier(rows[rows["bytes"] > 0])
    axis.step(ends["bytes"], ends["fid"], where="post", color=INK, linestyle=":", linewidth=1, marker="")
    scale_bytes(axis)
    axis.set_xlabel("exchanged, both ways (bytes)")
    axis.set_ylabel("FID")
    axis.set_ylim(bottom=0)
    marks.name(axis)
    return curves


def frontier(rows: pd.DataFrame) -> pd.DataFrame:
    """The Pareto frontier: rows with a lower FID than all rows of as many or fewer bytes, by bytes."""
    sorted_ = rows.sort_values(["bytes", "fid"])
    return sorted_[sorted_["fid"] < sorted_["fid"].cummin().shift(fill_value=np.inf)]


def _but_transform(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key != TRANSFORM}
