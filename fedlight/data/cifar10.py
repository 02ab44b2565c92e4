"""CIFAR-10: 50,000 training and 10,000 test images, colour 32x32, 10 classes (Krizhevsky, 2009)."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedlight.data.dataset import Dataset, Images
from fedlight.data.download import download
from fedlight.runtime.errors import BadInput

FOLDER = "cifar-10-batches-py"
TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
SHAPE = (3, 32, 32)
ROW = int(np.prod(SHAPE))  # bytes of an image
ARRAY_NAMES = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
}
"""The names by which a pickled NumPy array refers to NumPy."""


def load(root: str | None, cache: str) -> Dataset:
    """Reads the batch files of the Python version without running what a pickle may call.

    Args:
        root: the folder that contains the folder cifar-10-batches-py, or null: the cache, where torchvision
            downloads it to.
        cache: the folder for downloads.

    Raises:
        BadInput: a file is missing, truncated or no batch of CIFAR-10, or the download failed.
    """
    folder = Path(cache if root is None else root) / FOLDER
    if root is None:
        download(folder, _fetch, "CIFAR-10", f"set data.root to a folder that holds {FOLDER}")
    elif not folder.is_dir():
        raise BadInput(
            f"data.root: no folder {FOLDER} in {root}; set data.root to the folder that contains it"
        )
    names = _read(folder / "batches.meta").get(b"label_names")
    if not isinstance(names, list) or not all(isinstance(name, bytes) for name in names):
        raise BadInput(f"data.root: {folder / 'batches.meta'} names no classes; fetch it again")
    classes = tuple(name.decode() for name in names)
    train = [_read_batch(folder / name, len(classes)) for name in TRAIN]
    pixels, labels = torch.cat([batch.pixels for batch in train]), np.concatenate([b.labels for b in train])
    return Dataset(Images(pixels, labels), _read_batch(folder / "test_batch", len(classes)), classes)


def _fetch(folder: str) -> None:
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import download_and_extract_archive

    download_and_extract_archive(CIFAR10.url, folder, filename=CIFAR10.filename, md5=CIFAR10.tgz_md5)


class PickledArray:
    """Stands for all of NumPy in a pickle: it keeps the arguments and the state, and computes nothing."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def rows(self) -> bytes | None:
        """The bytes of a C-ordered uint8 array of shape (n, ROW); None for any other."""
        match self.state:
            case (1, (int(), width), PickledArray(arguments=(b"u1" | "u1", *_)), False | 0, bytes(content)):
                return content if width == ROW else None
        return None


class DataUnpickler(pickle.Unpickler):
    """Unpickles plain Python values and `PickledArray`; any other class or function is refused."""

    def find_class(self, module: str, name: str) -> type[PickledArray]:
        if (module, name) not in ARRAY_NAMES:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no batch of CIFAR-10 does")
        return PickledArray


def _read(path: Path) -> dict[Any, Any]:
    try:
        with path.open("rb") as file:
            content = DataUnpickler(file, encoding="bytes").load()
    except FileNotFoundError as error:
        raise BadInput(f"data.root: no file {path.name} in {path.parent}") from error
    except Exception as error:  # a broken pickle raises almost anything
        raise BadInput(f"data.root: {path} cannot be read ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise BadInput(f"data.root: {path} is no file of CIFAR-10; fetch it again")
    return content


def _read_batch(path: Path, classes: int) -> Images:
    content = _read(path)
    array, labels = content.get(b"data"), content.get(b"labels")
    rows = array.rows() if isinstance(array, PickledArray) else None
    if (
        rows is None
        or not isinstance(labels, list)
        or len(rows) != ROW * len(labels)
        or not all(isinstance(label, int) and 0 <= label < classes for label in labels)
    ):
        raise BadInput(
            f"data.root: {path} is no batch of CIFAR-10: it must hold data, uint8 of shape (n, {ROW}), "
            f"and n labels in 0..{classes - 1}; fetch it again"
        )
    pixels = np.frombuffer(bytearray(rows), np.uint8).reshape(-1, *SHAPE)
    return Images(torch.from_numpy(pixels), np.array(labels, np.int64))
