"""The figure of image quality against what was exchanged."""

from collections.abc import Hashable, Mapping
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

LINE_POINTS = 9  # of a dashed line, under the pointer
TRANSFORM = "transform.name"  # beside methods it is what decides how many bytes are exchanged
FINETUNING = (
    "finetuning."  # and so do adapters, which need their own learning rate and exclude keys of models
)


def quality_exchange(comparison: Comparison, prefix: str) -> Plot:
    """FID over the bytes exchanged, both ways, in all rounds: the question of the paper.

    Where cells differ in `finetuning`, all settings of a partition are in one panel.
    """
    tuned = any(key.startswith(FINETUNING) for settings in comparison.settings.values() for key in settings)
    rows = [
        {
            "panel": place._replace(
                setting="" if tuned else describe_setting(_but_transform(settings))
            ).panel,
            "method": group.method,
            "setting": place.setting,
            "transform": settings.get(TRANSFORM) or "none",
            "kind": _kind(settings, tuned),
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
    columns = ["panel", "method", "setting", "transform", "kind", "clients", "bytes", "fid", "fid_std"]
    data = pd.DataFrame(rows, columns=[*columns, "fid_std_over", "cells"])
    key = "kind" if data["kind"].nunique() > 1 else "clients"
    marks = Marks(data[key])
    return Plot(
        f"{prefix}quality_exchange",
        "Quality against exchange",
        "One curve per method and setting, from the fewest clients to the most. Lower left is better: good "
        "images for few bytes; nothing lies below the dotted frontier. Bars: standard deviation over seeds "
        "or clients. Dashed: nothing is exchanged; marked at the right where the number of clients matters.",
        data,
        partial(_draw_quality, palette=comparison.palette, key=key, marks=marks),
        comparison.palette,
        below=marks.below,
    )


def _draw_quality(
    axis: Axes, rows: pd.DataFrame, palette: dict[str, str], key: str, marks: Marks
) -> list[Curve]:
    """Draws a curve for each method and setting; a mark stands for each value of `key`."""
    exchanging = rows[rows["bytes"] > 0]
    for (method, _), group in exchanging.groupby(["method", "setting"], sort=False):
        colour, points = palette[str(method)], group.sort_values("clients")
        spread = points["fid_std"].astype(float)
        axis.errorbar(points["bytes"], points["fid"], spread, color=colour, elinewidth=1, capsize=2)
        for x, y, value in zip(points["bytes"], points["fid"], points[key], strict=True):
            axis.plot(x, y, color=colour, marker=marks.of[value])
    ends = frontier(exchanging)
    axis.step(ends["bytes"], ends["fid"], where="post", color=INK, linestyle=":", linewidth=1, marker="")
    scale_bytes(axis)
    sides = axis.get_xlim()
    axis.set_xlim(sides)
    curves = [
        Curve(
            name_curve(line["method"], line["cells"], **_differences(line)),
            [_point(line, line["bytes"])],
        )
        for line in exchanging.to_dict("records")
    ]
    for method, group in rows[rows["bytes"] == 0].groupby("method", sort=False):
        several = group["fid"].nunique() > 1  # else the number of clients does not matter
        for line in group.drop_duplicates("fid").to_dict("records"):
            axis.axhline(line["fid"], color=palette[str(method)], linestyle="--", linewidth=1)
            if several:
                axis.plot(
                    sides[1],
                    line["fid"],
                    color=palette[str(method)],
                    marker=marks.of[line[key]],
                    clip_on=False,
                )
            along = np.geomspace(*sides, num=LINE_POINTS)
            curves.append(Curve(name_curve(method, line["cells"]), [_point(line, x) for x in along]))
    axis.set_xlabel("exchanged, both ways (bytes)")
    axis.set_ylabel("FID")
    highest = (rows["fid"] + rows["fid_std"].astype(float).fillna(0)).max()
    axis.set_ylim(0, 1.06 * highest)
    marks.name(axis)
    return curves


def _point(line: Mapping[Hashable, Any], x: float) -> Point:
    """The point of a row of the figure's data at x."""
    exchanged = numbers.data_volume(line["bytes"]) if line["bytes"] else "nothing exchanged"
    score = score_text("FID", line["fid"], line["fid_std"])
    return Point(x, line["fid"], f"{line['clients']} clients, {exchanged}: {score}")


def frontier(rows: pd.DataFrame) -> pd.DataFrame:
    """The Pareto frontier: rows with a lower FID than all rows of as many or fewer bytes, by bytes."""
    sorted_ = rows.sort_values(["bytes", "fid"])
    return sorted_[sorted_["fid"] < sorted_["fid"].cummin().shift(fill_value=np.inf)]


def _kind(settings: Mapping[str, Any], tuned: bool) -> str:
    """What decides the bytes beside the method: `best`; where cells are fine-tuned `rank 4, best`."""
    transform = settings.get(TRANSFORM) or "none"
    if not tuned:
        return transform
    rank = settings.get("finetuning.rank")
    adapters = "" if rank is None else f"rank {numbers.plain(rank)}"
    words = [
        {"full": "all weights", None: "from scratch"}.get(settings.get("finetuning.name", "lora"), adapters)
    ]
    words += ["B alone"] if settings.get("finetuning.train") == "b" else []
    words += [
        word for key in ("algorithm.name", TRANSFORM) if (word := settings.get(key)) not in (None, "none")
    ]
    return ", ".join(filter(None, words))


def _differences(line: Mapping[Hashable, Any]) -> dict[str, str]:
    """What distinguishes a point of a method from others, for its name."""
    same = line["kind"] == line["transform"]
    return {"transform": line["transform"]} if same else {"setting": line["kind"]}


def _but_transform(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key != TRANSFORM}
