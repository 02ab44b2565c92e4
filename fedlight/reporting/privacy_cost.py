"""The figure of what privacy costs: image quality against epsilon."""

import math
from functools import partial

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from fedlight.reporting.comparison import Comparison, Group
from fedlight.reporting.curves import Curve, Point, name_curve, score_text
from fedlight.reporting.marks import Marks
from fedlight.reporting.plots import INK, Plot
from fedlight.reporting.setting_keys import AXES, REPEATED, describe_setting, varying_keys
from fedlight.runs.reader import Result

NOISE = ("privacy.noise", "privacy.target_epsilon")  # keys that epsilon stands for
ROOM = 0.1  # of a label at the axis, as a share of its length


def quality_epsilon(comparison: Comparison, prefix: str) -> Plot:
    """FID over the epsilon of the guarantee; empty where no method has cells of two epsilons."""
    all_groups = [group for place in comparison.places for group in comparison.in_place(place)]
    scored = [group for group in all_groups if group.fid is not None and not group.everywhere]
    guaranteed = [group for group in scored if group.mean(_epsilon)]  # 0, of no round, has no logarithm
    settings = [comparison.settings[group.place.setting] for group in guaranteed]
    shared = {key for key in comparison.varying if len({repr(setting[key]) for setting in settings}) == 1}
    panels: dict[str, list[Group]] = {}
    for group, setting in zip(guaranteed, settings, strict=True):
        differing = {key: value for key, value in setting.items() if key not in shared.union(NOISE)}
        panels.setdefault(group.place._replace(setting=describe_setting(differing)).panel, []).append(group)
    rows = [
        {
            "panel": panel,
            "method": group.method,
            "clients": group.place.clients,
            "epsilon": group.mean(_epsilon),
            "fid": group.fid,
            "fid_std": group.spread[0],
            "fid_std_over": group.spread[1],
            "cells": group.names,
        }
        for panel, groups in panels.items()
        for group in scored
        if group in groups or any(_is_unprotected(group, other) for other in groups)
    ]
    columns = ["panel", "method", "clients", "epsilon", "fid", "fid_std", "fid_std_over", "cells"]
    data = pd.DataFrame(rows, columns=columns).astype({"epsilon": float, "fid_std": float})
    lines = data.groupby(["panel", "method", "clients"])["epsilon"].nunique()
    data = data[data["panel"].isin(lines[lines > 1].index.get_level_values("panel"))]
    drawn = set(data["method"])
    palette = {method: colour for method, colour in comparison.palette.items() if method in drawn}
    marks = Marks(data["clients"])
    return Plot(
        f"{prefix}quality_epsilon",
        "Privacy: quality against epsilon",
        "FID over the epsilon of the guarantee, one line per method and number of clients. Further left is "
        "more private, lower is better. Right of the dotted line is no guarantee: inf is clipped without "
        "noise, none is not clipped either. Bars: standard deviation over seeds or clients.",
        data,
        partial(_draw_epsilon, palette=palette, marks=marks),
        palette,
        below=marks.below,
    )


def _epsilon(result: Result) -> float | None:
    """The epsilon of a cell's guarantee: infinite where it only clips, None where it does not clip either."""
    guarantee = result.privacy
    return None if guarantee is None or math.isinf(guarantee.clip) else guarantee.epsilon


def _is_unprotected(group: Group, other: Group) -> bool:
    """Whether a group has no privacy, and else the configuration of another group, which has."""
    mine, others = (cells[0].files.config for cells in (group.cells, other.cells))
    private = {key for key in (*mine, *others) if key.startswith("privacy.")}
    return (
        group.mean(_epsilon) is None
        and group.place.partition == other.place.partition
        and mine.get("privacy.name") in (None, others.get("privacy.name"))
        and not varying_keys([group.cells[0], other.cells[0]], {*AXES, *REPEATED, *private})
    )


def _describe_epsilon(epsilon: float) -> str:
    return "no guarantee" if math.isnan(epsilon) else f"epsilon {epsilon:.3g}"


def _draw_epsilon(axis: Axes, rows: pd.DataFrame, palette: dict[str, str], marks: Marks) -> list[Curve]:
    """Draws FID over epsilon in log scale; cells without a guarantee stand apart at the right."""
    epsilon = rows["epsilon"]
    finite = np.isfinite(epsilon)
    low, high = epsilon[finite].min(), epsilon[finite].max()
    step = max(2.0, (high / low) ** 0.25)
    at, edge, labels = epsilon.where(finite), high, {}
    for label, beyond in (("inf", np.isposinf(epsilon)), ("none", epsilon.isna())):
        if beyond.any():
            edge *= step
            at, labels[edge] = at.mask(beyond, edge), label
    free = low
    for value in sorted(epsilon[finite]):
        if value >= free:
            labels[value] = f"{value:.2g}"
            free = value * (edge / low) ** ROOM
    rows = rows.assign(at=at, finite=finite).sort_values("at")
    curves = []
    for (method, clients, joined), points in rows.groupby(["method", "clients", "finite"]):
        axis.errorbar(
            points["at"],
            points["fid"],
            points["fid_std"],
            color=palette[str(method)],
            marker=marks.of[clients],
            linestyle="-" if joined else "",
            elinewidth=1,
            capsize=2,
        )
        for line in points.to_dict("records"):
            at_epsilon = f"{clients} clients, {_describe_epsilon(line['epsilon'])}"
            text = f"{at_epsilon}: {score_text('FID', line['fid'], line['fid_std'])}"
            curves.append(Curve(name_curve(method, line["cells"]), [Point(line["at"], line["fid"], text)]))
    if not finite.all():
        axis.axvline(high * step**0.5, color=INK, linestyle=":", linewidth=1)
    axis.set_xscale("log")
    axis.set_xticks([*labels], [*labels.values()])
    axis.minorticks_off()
    axis.set_xlabel("epsilon")
    axis.set_ylabel("FID")
    axis.set_ylim(bottom=0)
    marks.name(axis)
    return curves
