"""The tables and the figure on privacy: guarantees of cells, and attacks on them (`fedlight.audit`)."""

from functools import partial
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from fedlight.reporting import numbers
from fedlight.reporting.comparison import Comparison, Group, Place
from fedlight.reporting.curves import Curve, Point
from fedlight.reporting.plots import INK, Plot
from fedlight.reporting.tables import Field, ReportTable, number
from fedlight.runs.status import SweepCell

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LEAST = 1e-3  # of the logarithmic axes


def tables(comparison: Comparison, prefix: str) -> list[ReportTable]:
    """The tables of guarantees and of attacks, where there are any."""
    return [table for table in (_guarantees(comparison, prefix), _attacks(comparison, prefix)) if table.rows]


def _cells(comparison: Comparison) -> list[tuple[Place, Group, SweepCell]]:
    return [
        (place, group, cell)
        for place in comparison.places
        for group in comparison.in_place(place)
        for cell in group.cells
    ]


def _guarantees(comparison: Comparison, prefix: str) -> ReportTable:
    rows, data = [], []
    for place, group, cell in _cells(comparison):
        if not (cell.files.result and (guarantee := cell.files.result.privacy)):
            continue
        values: dict[str, Any] = {
            "place": place.label,
            "method": group.method,
            "seed": cell.files.result.seed,
        }
        values |= guarantee.model_dump()
        rounded = {"epsilon": f"{guarantee.epsilon:.2f}", "noise": f"{guarantee.noise:.3g}"}
        rows.append([Field(rounded.get(key, str(value)), value) for key, value in values.items()])
        data.append(values)
    return ReportTable(
        f"{prefix}privacy",
        "Privacy: guarantees",
        "(epsilon, delta) differential privacy after all rounds, of one client (kind client) or of one image "
        "of the client that spent most (kind example). Less is more private; inf is no guarantee.",
        ["setting", "method", "seed", "kind", "epsilon", "delta", "noise", "clip"],
        {"seed", "epsilon", "delta", "noise", "clip"},
        rows,
        data,
    )


def _attacks(comparison: Comparison, prefix: str) -> ReportTable:
    rows, data = [], []
    for place, group, cell in _cells(comparison):
        for attack in cell.files.audit.attacks:
            named = {"place": place.label, "method": group.method}
            named |= {"sees": attack.sees, "attack": attack.attack}
            rates = {"tpr_at_0.01": attack.tpr_at_1_percent, "tpr_at_0.001": attack.tpr_at_1_permille}
            figures = {"auc": attack.auc, **rates}
            rows.append(
                [
                    *(Field(str(value), value) for value in named.values()),
                    *(Field(f"{f[0]:.3f} ({f[1]:.3f}–{f[2]:.3f})", f[0]) for f in figures.values()),
                    number(attack.epsilon_lower, numbers.loss),
                ]
            )
            means = {key: figure[0] for key, figure in figures.items()}
            data.append({**named, **means, "epsilon_lower": attack.epsilon_lower})
    measured = ["AUC", "TPR at 1 % FPR", "TPR at 0.1 % FPR", "epsilon at least"]
    return ReportTable(
        f"{prefix}attacks",
        "Privacy: attacks",
        "How well an attacker tells training images from held-out ones, by the released model or, as the "
        "server can, by a client's update slice by slice; AUC 0.5 is guessing. In brackets: 95 % intervals.",
        ["setting", "method", "sees", "attack", *measured],
        set(measured),
        rows,
        data,
    )


def roc(comparison: Comparison, prefix: str) -> Plot:
    """The ROC, in log scale, of every attack on the first audited cell of a place and method."""
    rows: list[dict[str, Any]] = []
    for place, group, cell in _cells(comparison):
        panel = f"{place.label}, {group.method}"
        if any(row["panel"] == panel for row in rows):
            continue
        curves: dict[str, list[tuple[float, float]]] = {}
        for attack in cell.files.audit.attacks:
            slice_ = attack.sees.partition(": ")[2]
            curves.setdefault(slice_ or f"model, {attack.attack}", attack.roc)
        for name, corners in curves.items():
            rows += [{"panel": panel, "attack": name, "fpr": f, "tpr": t} for f, t in corners]
    names = list(dict.fromkeys(row["attack"] for row in rows))
    palette = dict(zip(names, COLOURS, strict=False))
    return Plot(
        f"{prefix}roc",
        "Privacy: ROC of the attacks",
        "True against false positive rate, both in log scale; dotted: guessing. The left end matters most: "
        "images that are identified with few errors. Slices are those of one client's update.",
        pd.DataFrame(rows, columns=["panel", "attack", "fpr", "tpr"]),
        partial(_draw_roc, palette=palette),
        palette,
    )


def _draw_roc(axis: Axes, rows: pd.DataFrame, palette: dict[str, str]) -> list[Curve]:
    axis.plot([LEAST, 1], [LEAST, 1], color=INK, linestyle=":", linewidth=1)
    curves = []
    for name, colour in palette.items():
        curve = rows[rows["attack"] == name]
        axis.step(curve["fpr"].clip(LEAST), curve["tpr"].clip(LEAST), where="post", color=colour)
        corners = zip(curve["fpr"].clip(LEAST), curve["tpr"].clip(LEAST), strict=True)
        rates = [Point(x, y, f"{y:.3g} of the members at {x:.3g} of the others") for x, y in corners]
        curves.append(Curve(name, rates))
    axis.set_xscale("log")
    axis.set_yscale("log")
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter("{x:g}")
    axis.set_xlim(LEAST, 1)
    axis.set_ylim(LEAST, 1)
    axis.set_xlabel("false positive rate")
    axis.set_ylabel("true positive rate")
    return curves
