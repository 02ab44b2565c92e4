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
SAFE = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
}
"""What a batch file may call: what rebuilds a NumPy array."""


def load(root: str | None, cache: str) -> Dataset:
    """Reads the batch files of the Python version.

    Args:
        root: the folder that holds the folder cifar-10-batches-py, or null: the cache, filled by torchvision.
        cache: the folder that downloads go to.

    Raises:
        BadInput: a file is missing, truncated or no batch of CIFAR-10, or the download failed.
    """
    folder = Path(cache if root is None else root) / FOLDER
    if root is None:
        download(folder, _fetch, "CIFAR-10", f"set data.root to a folder that holds {FOLDER}")
    elif not folder.is_dir():
        raise BadInput(f"data.root: no folder {FOLDER} in {root}")
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


class ArrayUnpickler(pickle.Unpickler):
    """Unpickles plain Python values and NumPy arrays, and refuses whatever would call anything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in SAFE:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no batch of CIFAR-10 does")
        return super().find_class(module, name)


def _read(path: Path) -> dict[Any, Any]:
    try:
        with path.open("rb") as file:
            content = ArrayUnpickler(file, encoding="bytes").load()
    except FileNotFoundError as error:
        raise BadInput(f"data.root: no file {path.name} in {path.parent}") from error
    except Exception as error:  # a broken pickle raises almost anything
        raise BadInput(f"data.root: {path} cannot be read ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise BadInput(f"data.root: {path} is no file of CIFAR-10; fetch it again")
    return content


def _read_batch(path: Path, classes: int) -> Images:
    content = _read(path)
    rows, labels = content.get(b"data"), content.get(b"labels")
    if (
        not isinstance(rows, np.ndarray)
        or rows.dtype != np.uint8
        or rows.ndim != 2
        or rows.shape[1] != np.prod(SHAPE)
        or not isinstance(labels, list)
        or len(labels) != len(rows)
        or not all(isinstance(label, int) and 0 <= label < classes for label in labels)
    ):
        raise BadInput(
            f"data.root: {path} is no batch of CIFAR-10: it must hold data, bytes in rows of "
            f"{np.prod(SHAPE)}, and labels in 0..{classes - 1}, one for each row"
        )
    return Images(torch.from_numpy(rows.reshape(-1, *SHAPE).copy()), np.array(labels, np.int64))
