"""The pictures of a cell: the grid of generated images and the heatmap of the partition."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from torch import Tensor

from fedlight.runtime.files import atomic


def sample_grid(path: Path, rows: Sequence[Tensor], labels: Sequence[str], title: str) -> None:
    """Draws generated images row by row.

    Args:
        path: the PNG to write.
        rows: each uint8, shape (images, channels, height, width), 1 or 3 channels.
        labels: what each row shows, one a row; empty for no label.
        title: of the whole grid.
    """
    columns = max(len(row) for row in rows)
    figure = Figure(figsize=(0.55 * columns + 1.2, 0.55 * len(rows) + 0.6), dpi=144, layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row_axes, images, label in zip(axes, rows, labels, strict=True):
        for axis in row_axes:
            axis.set_axis_off()
        for axis, image in zip(row_axes, images, strict=False):
            pixels = image.permute(1, 2, 0).numpy()
            axis.imshow(pixels if pixels.shape[-1] == 3 else pixels[..., 0], cmap="gray", vmin=0, vmax=255)
        row_axes[0].text(
            -0.15, 0.5, label, transform=row_axes[0].transAxes, ha="right", va="center", fontsize=8
        )
    figure.suptitle(title, fontsize=9)
    _save(figure, path)


def partition_heatmap(path: Path, counts: NDArray[Any], classes: Sequence[str], title: str) -> None:
    """Draws the images of each client and label; `counts` has shape (clients, classes)."""
    clients, labels = counts.shape
    width, height = min(2 + 0.55 * labels, 16), min(1.6 + 0.32 * clients, 12)
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(counts, cmap="viridis", aspect="auto", vmin=0)
    axis.set_xlabel("label")
    axis.set_ylabel("client")
    axis.set_xticks(np.arange(labels), classes, rotation=45 if labels > 4 else 0, ha="right", fontsize=7)
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    if clients <= 20 and labels <= 16:
        for (client, label), count in np.ndenumerate(counts):
            shade = "black" if count > 0.6 * counts.max() else "white"
            axis.text(label, client, str(count), ha="center", va="center", fontsize=6, color=shade)
    figure.colorbar(image, label="images")
    axis.set_title(title, fontsize=9)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    with atomic(path) as temporary:
        FigureCanvasAgg(figure).print_png(temporary)
