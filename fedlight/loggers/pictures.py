"""The pictures of a cell: the grid of generated images and the heatmap of the partition."""

import textwrap
from collections.abc import Sequence
from functools import lru_cache
from io import BytesIO
from math import ceil, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from fedlight.runtime.files import atomic
from fedlight.runtime.literal_text import escape_missing_glyphs, literal_text

COLUMNS = 16  # of a sample grid
TITLE_CHARACTER = 0.075  # inches
FRAME, LAST_FRAME = 150, 1500  # of an animation, in milliseconds


@literal_text
def sample_grid(
    path: Path, rows: Sequence[tuple[str, Tensor]], title: str, heads: Sequence[str] = ()
) -> None:
    """Draws images, with one row for each model, or several if its images do not fit into one.

    Args:
        path: the PNG to write.
        rows: label, may be empty, and images of each model, uint8, shape (n, channels, height, width), with 1
            or 3 channels.
        title: of the figure.
        heads: labels of the columns, at most COLUMNS; empty for columns without labels.
    """
    across = len(heads) or COLUMNS
    lines = [
        (label if first == 0 else "", images[first : first + across])
        for label, images in rows
        for first in range(0, len(images), across)
    ]
    columns = max(len(images) for _, images in lines)
    shape, gap = lines[0][1].shape[1:], max(1, lines[0][1].shape[-1] // 8)
    cells = torch.full((len(lines), columns, *shape), 255, dtype=torch.uint8)
    for place, (_, images) in zip(cells, lines, strict=True):
        place[: len(images)] = images
    sheet = make_grid(cells.flatten(0, 1), nrow=columns, padding=gap, pad_value=255)

    width = 0.55 * columns + 1.4
    wrapped = textwrap.wrap(title, int(width / TITLE_CHARACTER))
    height = 0.55 * len(lines) + 0.45 + 0.15 * len(wrapped)
    figure = Figure(figsize=(width, height), dpi=144, layout="constrained")
    axis = figure.subplots()
    axis.imshow(sheet.permute(1, 2, 0).numpy())
    axis.set_frame_on(False)
    pitch = shape[-1] + gap
    centres = gap + shape[-1] / 2 + pitch * np.arange(len(heads))
    axis.set_xticks(centres, heads, fontsize=8)
    axis.xaxis.tick_top()
    middles = gap + shape[-1] / 2 + pitch * np.arange(len(lines))
    axis.set_yticks(middles, [label for label, _ in lines], fontsize=8)
    axis.tick_params(length=0)
    figure.suptitle("\n".join(wrapped), fontsize=9)
    _save(figure, path)


def single_image(path: Path, image: Tensor, scale: int = 1) -> None:
    """Writes one image, uint8, shape (channels, height, width), with pixels enlarged `scale` times."""
    with atomic(path) as temporary:
        _enlarged(image, scale).save(temporary, "PNG")


def pixel_grid(path: Path, images: Tensor, scale: int) -> None:
    """Writes images, uint8, shape (n, channels, height, width), as a grid without labels or margins."""
    single_image(path, _sheet(images), scale)


def animation(path: Path, frames: Sequence[Tensor], scale: int) -> None:
    """Writes a GIF of frames, uint8, shape (n, channels, height, width); the last one is shown longest."""
    first, *others = [_enlarged(_sheet(images), scale) for images in frames]
    times = [FRAME] * len(others) + [LAST_FRAME]
    with atomic(path) as temporary:
        first.save(temporary, "GIF", save_all=True, append_images=others, duration=times, loop=0)


def _sheet(images: Tensor) -> Tensor:
    across = min(COLUMNS, ceil(sqrt(len(images))))
    return make_grid(images, nrow=across, padding=1, pad_value=255)[:, 1:-1, 1:-1]


def _enlarged(image: Tensor, scale: int) -> Image.Image:
    pixels = image.permute(1, 2, 0).numpy()
    made = Image.fromarray(pixels if pixels.shape[-1] == 3 else pixels[..., 0])
    return made.resize((made.width * scale, made.height * scale), Image.Resampling.NEAREST)


@literal_text
def memorisation_histogram(path: Path, generated: NDArray[Any], unseen: NDArray[Any], title: str) -> None:
    """Draws histograms of the ratio of distances to the nearest training and to the nearest test image."""
    figure = Figure(figsize=(5.5, 3.4), dpi=144, layout="constrained")
    axis = figure.subplots()
    edges = np.linspace(0, max(2.0, float(np.quantile(unseen, 0.99))), 41).tolist()
    for ratios, label, colour in (
        (unseen, "unseen test images", "#E69F00"),
        (generated, "generated images", "#0072B2"),
    ):
        share = np.full(len(ratios), 1 / len(ratios))
        axis.hist(np.minimum(ratios, edges[-1]), edges, weights=share, alpha=0.6, label=label, color=colour)
    axis.set_xlabel("distance to the nearest training image / to the nearest test image")
    axis.set_ylabel("share of images")
    axis.set_title(title, fontsize=9)
    figure.legend(fontsize=8, loc="outside lower center", ncols=2)
    _save(figure, path)


def partition_heatmap(path: Path, counts: NDArray[Any], classes: Sequence[str]) -> None:
    """Draws the number of images of each client and label; `counts` has shape (clients, classes)."""
    picture = _heatmap_png(counts.astype(np.int64).tobytes(), tuple(classes))
    with atomic(path) as temporary:
        temporary.write_bytes(picture)


@lru_cache(maxsize=8)
@literal_text
def _heatmap_png(content: bytes, classes: tuple[str, ...]) -> bytes:
    """The heatmap as PNG; most cells of a sweep have the partition of another one.

    Args:
        content: of the counts, int64, shape (clients, classes).
        classes: their names.
    """
    counts = np.frombuffer(content, np.int64).reshape(-1, len(classes))
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
    axis.set_title(f"{counts.sum():,} images", fontsize=9)
    escape_missing_glyphs(figure)
    file = BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    return file.getvalue()


def _save(figure: Figure, path: Path) -> None:
    escape_missing_glyphs(figure)
    with atomic(path) as temporary:
        FigureCanvasAgg(figure).print_png(temporary)
