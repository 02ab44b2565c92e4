"""Fashion-MNIST: 60,000 training and 10,000 test images, grey 28x28, 10 classes (arXiv 1708.07747)."""

import gzip
import zlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fedlight.data.data_name import DEBIAN
from fedlight.data.dataset import Dataset, Images
from fedlight.data.download import download
from fedlight.runtime.errors import BadInput

ADVICE = (
    "install the Debian package dataset-fashion-mnist, or set data.root to a folder with the four IDX files"
)
CLASSES = (
    *("T-shirt", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)


def load(root: str | None, cache: str) -> Dataset:
    """Reads the four IDX files, plain or gzipped.

    Args:
        root: the folder that contains them, or null: the folder of the Debian package dataset-fashion-mnist
            if it is installed, otherwise the cache, where torchvision downloads them to.
        cache: the folder for downloads.

    Raises:
        BadInput: a file is missing, truncated or no IDX file.
    """
    if root is not None:
        folder = Path(root)
    elif DEBIAN.is_dir():
        folder = DEBIAN
    else:
        folder = Path(cache) / "FashionMNIST" / "raw"
        download(folder.parent, _fetch, "Fashion-MNIST", ADVICE)
    splits = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        pixels = _read_idx(folder, f"{prefix}-images-idx3-ubyte", dimensions=3)
        labels = _read_idx(folder, f"{prefix}-labels-idx1-ubyte", dimensions=1)
        splits[split] = Images(torch.from_numpy(pixels[:, None]), labels.astype(np.int64))
    return Dataset(splits["train"], splits["test"], CLASSES)


def _fetch(root: str) -> None:
    from torchvision.datasets import FashionMNIST

    FashionMNIST(root, download=True)


def _read_idx(folder: Path, name: str, dimensions: int) -> NDArray[np.uint8]:
    """Reads an IDX file of bytes (the format of MNIST), `name` or `name`.gz in `folder`."""
    path = next((p for p in (folder / f"{name}.gz", folder / name) if p.is_file()), None)
    if path is None:
        raise BadInput(f"data.root: no file {name} or {name}.gz in {folder}; {ADVICE}")
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise BadInput(f"data.root: {path} cannot be read ({error}); fetch it again") from error
    header = np.frombuffer(content[: 4 + 4 * dimensions], ">u4")
    if len(header) != 1 + dimensions or header[0] != 0x0800 + dimensions:
        raise BadInput(
            f"data.root: {path} is no IDX file of bytes in {dimensions} dimensions; fetch it again"
        )
    shape, body = tuple(int(length) for length in header[1:]), content[4 + 4 * dimensions :]
    if len(body) != np.prod(shape):
        raise BadInput(
            f"data.root: {path} is truncated: {len(body)} of {np.prod(shape)} bytes; fetch it again"
        )
    return np.frombuffer(bytearray(body), np.uint8).reshape(shape)
