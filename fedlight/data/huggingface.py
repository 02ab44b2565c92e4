"""Data sets of the Hugging Face Hub, and folders in its formats: parquet, Arrow, images with metadata."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedlight.data.data_name import hub_revision
from fedlight.data.dataset import Dataset, Images
from fedlight.data.folder_files import list_files
from fedlight.data.image_file import MODES, crop_and_resize, explain_unreadable, read_image
from fedlight.data.image_folder import hold_out
from fedlight.runtime.cache import explain_cache
from fedlight.runtime.errors import BadInput
from fedlight.runtime.files import atomic
from fedlight.runtime.progress import track

INSTALL = "data=huggingface needs the library datasets: pip install 'fedlight[huggingface]'"
ONE_CLASS = "all"
AT_ONCE = 256  # images that are decoded in parallel
VERSION = 1  # of the decoding, part of the cached file's name
LOCAL = {".parquet": "parquet", ".arrow": "arrow"}
"""Readers of datasets by the ending of a folder's files; another folder is one of images."""


def load(
    cache: str,
    image_size: int,
    channels: int,
    path: str | None = None,
    subset: str | None = None,
    split: str = "train",
    image_column: str = "image",
    label_column: str | None = "label",
    client_column: str | None = None,
) -> Dataset:
    """Reads a data set by the library datasets; images are cropped to their central square and resized.

    If the set has a split `test` it is the test set, otherwise a fifth of each class is held out for testing.

    Args:
        cache: the folder for decoded images, and for what datasets makes of a local folder.
        image_size: in pixels.
        channels: 1 for grey, 3 for RGB.
        path: a folder, or an id of the Hub, such as `ylecun/mnist`.
        subset: configuration of a set of the Hub that has several; None for the only one.
        split: to train on.
        image_column: column of the images.
        label_column: column of the labels: class labels, whole numbers or text; None for one class, "all".
        client_column: column that says whose image it is (site, patient, writer), for `partition=natural`;
            None for none.

    Raises:
        BadInput: the library or the set is missing, a column is missing or of the wrong kind, or an image
            cannot be read.
    """
    if path is None:
        raise BadInput(
            "data=huggingface needs a data set: set data.path=FOLDER (parquet, Arrow, images with metadata), "
            "or an id of the Hub, such as data.path=ylecun/mnist"
        )
    if channels not in MODES:
        raise BadInput(f"data.channels must be 1 (grey) or 3 (RGB), got {channels}")
    splits = _open(path, subset, cache)
    if split not in splits:
        raise BadInput(f"data.split={split} is no split of {path}; there are {', '.join(splits)}")
    tables = [splits[split], *([splits["test"]] if "test" in splits and split != "test" else [])]
    columns = {"image_column": image_column, "label_column": label_column, "client_column": client_column}
    for key, column in columns.items():
        if column is not None and column not in tables[0].column_names:
            names = ", ".join(tables[0].column_names)
            raise BadInput(f"data.{key}={column} is no column of {path}; there are {names}")
    classes, labels = _number(path, tables, label_column)
    sites, groups = _number(path, tables[:1], client_column)
    parts = [
        Images(torch.from_numpy(_pixels(path, table, image_column, cache, image_size, channels)), numbers)
        for table, numbers in zip(tables, labels, strict=True)
    ]
    if len(parts) == 1:
        chosen, held_out = hold_out(labels[0])
        if not len(held_out):
            raise BadInput(
                f"data.path={path}: no class has two images, so that one can be held out for testing"
            )
    else:
        chosen, held_out = np.random.RandomState(0).permutation(len(labels[0])), None
    train = _take(parts[0], chosen, groups[0] if client_column else None)
    test = parts[1] if held_out is None else _take(parts[0], held_out, None)
    note = f"data.path {path}: {len(train):,} images to train on, {len(test):,} to test on; {len(classes):,} "
    note += "classes" if len(classes) != 1 else "class"
    if client_column:
        note += f"; {client_column} has {len(sites):,} values"
    return Dataset(train, test, classes, (note,))


def _take(images: Images, positions: NDArray[np.int64], groups: NDArray[np.int64] | None) -> Images:
    pixels = images.pixels[torch.from_numpy(positions)]
    return Images(pixels, images.labels[positions], None if groups is None else groups[positions])


def _open(path: str, subset: str | None, cache: str) -> dict[str, Any]:
    """The splits of a data set by name, each a `datasets.Dataset`."""
    try:
        import datasets
    except ImportError as error:
        raise BadInput(INSTALL) from error
    folder = Path(path)
    with _explained(path, is_folder=folder.is_dir()):
        if not folder.is_dir():
            return dict(datasets.load_dataset(path, subset, revision=hub_revision(path)))
        if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
            saved = datasets.load_from_disk(path)
            return dict(saved) if isinstance(saved, datasets.DatasetDict) else {"train": saved}
        endings = {file.suffix for file in list_files(folder).files}
        reader = next((name for ending, name in LOCAL.items() if ending in endings), "imagefolder")
        return dict(datasets.load_dataset(reader, data_dir=path, cache_dir=str(Path(cache, "huggingface"))))


@contextmanager
def _explained(path: str, is_folder: bool) -> Iterator[None]:
    """Raises BadInput where datasets raises anything, which it does of many types."""
    try:
        yield
    except Exception as error:
        lines = str(error).split("\n")
        reason = f"{type(error).__name__}: {lines[0]}" if lines[0] else type(error).__name__
        advice = (
            ""
            if is_folder
            else (
                "; there is no such folder, and the Hub gives no data set of this id: without internet, "
                "only those that were downloaded before can be used"
            )
        )
        raise BadInput(f"data.path={path}: {reason}{advice}") from error


def _number(
    path: str, tables: list[Any], column: str | None
) -> tuple[tuple[str, ...], list[NDArray[np.int64]]]:
    """Numbers the values of a column of labels or of clients.

    Returns:
        The names of the values, and for each table the number of each row's value, int64.
    """
    if column is None:
        return (ONE_CLASS,), [np.zeros(len(table), np.int64) for table in tables]
    feature = tables[0].features[column]
    values = [table[column][:] for table in tables]
    names = getattr(feature, "names", None)  # of a ClassLabel, whose values are numbers already
    if names is not None:
        numbers = [np.array(rows, np.int64) for rows in values]
        if any(len(rows) and rows.min() < 0 for rows in numbers):
            raise BadInput(f"data.path={path}: some rows have no value in the column {column}")
        return tuple(names), numbers
    kinds = {type(value) for rows in values for value in rows}
    if kinds not in ({int}, {str}, {bool}):
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise BadInput(f"data.path={path}: the column {column} must hold whole numbers or text, got {names}")
    order = sorted({value for rows in values for value in rows})
    position = {value: number for number, value in enumerate(order)}
    return tuple(map(str, order)), [np.array([position[v] for v in rows], np.int64) for rows in values]


def _pixels(
    path: str, table: Any, column: str, cache: str, image_size: int, channels: int
) -> NDArray[np.uint8]:
    """The images of a table, uint8, shape (rows, channels, image_size, image_size), memory-mapped.

    They are cached under a hash of their files' contents.
    """
    import datasets

    feature = table.features[column]
    stored = isinstance(feature, datasets.Image) or getattr(feature, "dtype", "") in (
        "binary",
        "large_binary",
    )
    if not (stored or (isinstance(feature, dict) and "bytes" in feature)):
        raise BadInput(f"data.image_column={column} of {path} holds {feature} and no images")
    rows = table.select_columns(column).cast_column(column, datasets.Image(decode=False))
    shape = (len(rows), channels, image_size, image_size)
    digest = hashlib.blake2b(repr((VERSION, shape)).encode(), digest_size=8)
    for row in rows:
        digest.update(hashlib.sha256(_content(path, row[column])).digest())
    file = Path(cache, "decoded", f"huggingface-{digest.hexdigest()}.npy")
    try:
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            with atomic(file) as temporary:
                pixels = np.lib.format.open_memmap(temporary, "w+", np.uint8, shape)
                _decode(path, rows, column, pixels)
                pixels.flush()
        return np.load(file, mmap_mode="c")
    except OSError as error:
        reason = explain_cache(error, "data.cache or FEDLIGHT_CACHE")
        raise BadInput(f"data.cache: decoded images cannot be kept: {reason}") from error


def _decode(path: str, rows: Any, column: str, pixels: NDArray[np.uint8]) -> None:
    channels, image_size = pixels.shape[1:3]

    def decode(row: dict[str, Any]) -> NDArray[np.uint8] | str:
        try:
            image = read_image(BytesIO(_content(path, row)), channels)
            if image.depth.largest is None:
                return f"{image.depth.name} values define no white; save them as 8 or 16 bits"
            return crop_and_resize(image.to_bytes(None), channels, image_size)
        except Exception as error:  # Pillow's readers raise almost anything for a broken file
            return explain_unreadable(error)

    starts = range(0, len(rows), AT_ONCE)
    with ThreadPool() as pool:
        for start in track(starts, "decoding images", len(starts)):
            for number, image in enumerate(pool.map(decode, rows[start : start + AT_ONCE][column]), start):
                if isinstance(image, str):
                    raise BadInput(f"data.path={path}: the image of row {number} cannot be read: {image}")
                pixels[number] = image


def _content(path: str, image: dict[str, Any] | None) -> bytes:
    """The bytes of an image's file; a file beside the table is read only from within the set's folder."""
    if image is None:
        raise BadInput(f"data.path={path}: some rows have no image")
    if image["bytes"] is not None:
        return bytes(image["bytes"])
    file = Path(image["path"])
    if not file.absolute().is_relative_to(Path(path).absolute()):
        raise BadInput(f"data.path={path}: the image {file} lies outside of the folder")
    return file.read_bytes()
