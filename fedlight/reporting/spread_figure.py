"""The figure of the spread over clients."""

from functools import partial

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from fedlight.reporting.comparison import Comparison
from fedlight.reporting.curves import Curve, Point, score_text
from fedlight.reporting.plots import Plot
from fedlight.runs.status import DONE


def client_spread(comparison: Comparison, prefix: str) -> Plot:
    """FID of each client's own model, for the methods that evaluate clients."""
    rows = [
        {
            "panel": place.panel,
            "method": group.method,
            "clients": place.clients,
            "seed": result.seed,
            "client": client,
            "fid": fid,
            "cell": cell.cell,
        }
        for place in comparison.places
        for group in comparison.in_place(place)
        for cell in group.cells
        if cell.state == DONE and (result := cell.files.result) and result.fid and result.fid.per_client
        for client, fid in zip(
            result.fid.clients or range(len(result.fid.per_client)), result.fid.per_client, strict=True
        )
    ]
    drawn = {str(row["method"]) for row in rows}
    palette = {method: colour for method, colour in comparison.palette.items() if method in drawn}
    return Plot(
        f"{prefix}client_spread",
        "Spread over clients",
        "FID of each client's own model, one dot per client; the line is their mean.",
        pd.DataFrame(rows, columns=["panel", "method", "clients", "seed", "client", "fid", "cell"]),
        partial(_draw_spread, palette=palette),
        palette,
    )


def _draw_spread(axis: Axes, rows: pd.DataFrame, palette: dict[str, str]) -> list[Curve]:
    groups = [(clients, method) for clients in sorted(set(rows["clients"])) for method in palette]
    curves = []
    for position, (clients, method) in enumerate(groups):
        group = rows[(rows["clients"] == clients) & (rows["method"] == method)]
        fids = group["fid"].to_numpy()
        if not len(fids):
            continue
        aside = np.linspace(-0.25, 0.25, len(fids)) if len(fids) > 1 else np.zeros(1)
        axis.scatter(position + aside, fids, color=palette[method], s=14, alpha=0.8, linewidths=0)
        axis.hlines(fids.mean(), position - 0.35, position + 0.35, color=palette[method], linewidth=2)
        for x, line in zip(position + aside, group.to_dict("records"), strict=True):
            text = score_text(f"client {line['client']}: FID", line["fid"], None)
            curves.append(Curve(f"{method}: {line['cell']}", [Point(x, line["fid"], text)]))
    counts = sorted(set(rows["clients"]))
    axis.set_xticks([len(palette) * (i + 0.5) - 0.5 for i in range(len(counts))], [str(n) for n in counts])
    axis.grid(visible=False, axis="x")
    axis.set_xlabel("clients")
    axis.set_ylabel("FID of a client's model")
    axis.set_ylim(bottom=0)
    return curves
