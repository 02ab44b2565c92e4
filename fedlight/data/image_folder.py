"""A folder of images, one sub-folder a class, of which a fixed fifth is for testing."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.model_selection import train_test_split

from fedlight.data.dataset import Dataset, Images
from fedlight.data.decoded import EXTENSIONS, decode
from fedlight.runtime.errors import BadInput

ONE_CLASS = "all"


def load(
    root: str | None, cache: str, image_size: int, channels: int, skip_unreadable: bool = False
) -> Dataset:
    """Reads the images, cut to their central square and resized.

    Args:
        root: the folder; images directly in it, without sub-folders, are one class, "all".
        cache: the folder that decoded images go to.
        image_size: in pixels.
        channels: 1 for grey, 3 for RGB.
        skip_unreadable: whether files that cannot be read as images are left out; else they are an error.

    Raises:
        BadInput: no folder, a class without images, none with two, or images that cannot be read.
    """
    if root is None:
        raise BadInput(
            "data=image_folder needs a folder of images, one sub-folder a class: set data.root=FOLDER"
        )
    files_of = _list(Path(root))
    files = [file for members in files_of.values() for file in members]
    labels = np.repeat(np.arange(len(files_of)), [len(members) for members in files_of.values()])
    train, test = _split(labels)
    if not len(test):
        raise BadInput(
            f"data.root: no class in {root} has two images, so that one can be held out for testing"
        )
    chosen = np.concatenate([train, test])
    asked = [files[position] for position in chosen]
    pixels, whole = decode("image_folder", asked, cache, image_size, channels, skip_unreadable)
    splits = [
        Images(pixels[part], labels[chosen[part]])
        if whole[part].all()
        else Images(pixels[part][torch.from_numpy(whole[part])], labels[chosen[part]][whole[part]])
        for part in (slice(len(train)), slice(len(train), None))
    ]
    return Dataset(
        train=splits[0],
        test=splits[1],
        classes=tuple(files_of),
    )


def _list(root: Path) -> dict[str, list[Path]]:
    """The files of each class, both sorted by name; what is hidden does not count."""
    if not root.is_dir():
        raise BadInput(f"data.root: no folder {root}")
    classes = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    loose = _images(root, "*")
    if classes and loose:
        raise BadInput(
            f"data.root: {root} holds both sub-folders and images such as {loose[0].name}: "
            "move the images into a sub-folder, which is their class, or elsewhere"
        )
    files_of = {path.name: _images(path, "**/*") for path in classes} or {ONE_CLASS: loose}
    for name, files in files_of.items():
        if not files:
            folder = root / name if classes else root
            raise BadInput(f"data.root: no images ({', '.join(EXTENSIONS)}) in {folder}")
    return files_of


def _images(folder: Path, pattern: str) -> list[Path]:
    return sorted(
        path
        for path in folder.glob(pattern)
        if path.suffix.lower() in EXTENSIONS
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _split(labels: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions to train on and to test on, stratified; the image of a class of one is trained on."""
    alone = np.bincount(labels)[labels] == 1
    rest, single = np.flatnonzero(~alone), np.flatnonzero(alone)
    if not len(rest):
        return single, rest
    held_out = max(-(-len(rest) // 5), len(np.unique(labels[rest])))
    train, test = train_test_split(rest, test_size=held_out, stratify=labels[rest], random_state=0)
    return np.concatenate([train, single]), test
