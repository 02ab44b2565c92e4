"""The figure of the partitions."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from fedlight.reporting.comparison import Comparison
from fedlight.reporting.curves import Curve, Point
from fedlight.reporting.plots import Plot

WIDE = 40  # labels; more are not named at the axis
LONG = 14  # characters of a label at the axis


def partitions(comparison: Comparison, prefix: str) -> Plot:
    """The number of training images of each client and label."""
    columns = ["client", "label", "count"]
    frames = []
    for place in comparison.places:
        groups = [group for group in comparison.in_place(place) if not group.everywhere]
        tables = (cell.files.partition for group in groups for cell in group.cells)
        if first := next(filter(None, tables), None):
            frames.append(pd.DataFrame(first, columns=columns).assign(panel=place.label))
    return Plot(
        f"{prefix}partitions",
        "Partitions",
        "Training images of each client and label, of the first seed.",
        pd.concat(frames) if frames else pd.DataFrame(columns=[*columns, "panel"]),
        _draw_partition,
        {},
        below=1.05 if any((frame["label"].str.len() > 2).any() for frame in frames) else 0.5,
    )


def _draw_partition(axis: Axes, rows: pd.DataFrame) -> list[Curve]:
    labels = list(dict.fromkeys(rows["label"]))
    counts = rows.pivot(index="client", columns="label", values="count")[labels].fillna(0)
    image = axis.imshow(counts.to_numpy(), cmap="cividis", aspect="auto", vmin=0)
    axis.grid(visible=False)
    if len(labels) <= WIDE:
        short = [label if len(label) <= LONG else f"{label[: LONG - 1]}…" for label in labels]
        turned = 90 if max(map(len, labels)) > 2 else 0
        axis.set_xticks(range(len(labels)), short, rotation=turned, fontsize=7)
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("label")
    axis.set_ylabel("client")
    left, bottom, width, height = axis.get_position().bounds
    axis.set_position((left, bottom, 0.9 * width, height))  # the scale's numbers need room on its right
    figure = axis.get_figure(root=True)
    assert figure is not None
    figure.colorbar(image, ax=axis, label="images", ticks=MaxNLocator(5, integer=True))
    return [
        Curve(
            f"client {client}",
            [Point(x, y, f"label {label}: {row[label]:,.0f} images") for x, label in enumerate(labels)],
        )
        for y, (client, row) in enumerate(counts.iterrows())
    ]
